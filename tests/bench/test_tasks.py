"""Tasks: the prompts in the paper's words, and the hub's rows as ours."""

from typing import Any

import pytest

from reftune.bench.tasks import SUITES, PairTask, TextTask, task

QUESTION = {"context": "", "question": "A cactus stem stores", "choices": ["fruit", "liquid", "food"], "answer": 1}


def item(name: str, row: dict[str, Any]) -> Any:
    found = task(name)
    assert isinstance(found, TextTask)
    return found.item(row)


def test_the_suites_hold_the_papers_tasks() -> None:
    assert {s: len(names) for s, names in SUITES.items()} == {
        "commonsense": 9,
        "arithmetic": 8,
        "instruct": 4,
        "glue": 9,
    }
    with pytest.raises(ValueError, match="Did you mean 'arc_easy'"):
        task("arc-easy")
    with pytest.raises(ValueError, match="Known: boolq"):
        task("xyzzy")


@pytest.mark.parametrize(
    ("name", "row", "prompt", "response"),
    [
        (
            "arc_easy",
            QUESTION,
            "Please choose the correct answer to the question: A cactus stem stores\n\n"
            "Answer1: fruit Answer2: liquid Answer3: food\n\nAnswer format: answer1/answer2/answer3\n",
            "the correct answer is answer2",
        ),
        (
            "siqa",
            QUESTION | {"context": "It is dry."},
            "Please choose the correct answer to the question: It is dry. A cactus stem stores\n\n"
            "Answer1: fruit Answer2: liquid Answer3: food\n\nAnswer format: answer1/answer2/answer3\n",
            "the correct answer is answer2",
        ),
        (
            "piqa",
            {"context": "", "question": "Rest", "choices": ["Sit", "Run"], "answer": 0},
            "Please choose the correct solution to the question: Rest\n\nSolution1: Sit\n\nSolution2: Run\n\n"
            "Answer format: solution1/solution2\n",
            "the correct answer is solution1",
        ),
        (
            "winogrande",
            {"context": "", "question": "_ ran.", "choices": ["Al", "Bo"], "answer": 1},
            "Please choose the correct answer to fill in the blank to complete the given sentence: _ ran.\n\n"
            "Option1: Al Option2: Bo Answer format: option1/option2\n",
            "the correct answer is option2",
        ),
        (
            "boolq",
            {"context": "A passage that the paper leaves out.", "question": "is it?", "choices": [], "answer": 1},
            "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false\n",
            "the correct answer is false",
        ),
        (
            "addsub",
            {"question": "1 and 2?", "answer": 3, "solution": "X = 1 + 2"},
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\n1 and 2?\n\n### Response:\n",
            "X = 1 + 2\nThe answer is 3.",
        ),
        (
            "gsm8k",
            {"question": "q", "answer": 1200.5, "solution": "It is 2*3=<<2*3=6>>6."},
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nq\n\n### Response:\n",
            "It is 2*3=6.\nThe answer is 1200.5.",
        ),
        (
            "aqua",
            {"question": "q", "answer": 2, "choices": ["5", "6", "7", "8", "9"], "solution": None},
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nq Answer Choices: (A) 5 (B) 6 (C) 7 (D) 8 (E) 9\n\n### Response:\n",
            "The answer is C.",
        ),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
            "### Response:\n",
            "3",
        ),
    ],
)
def test_prompts_and_responses(name: str, row: dict[str, Any], prompt: str, response: str) -> None:
    found = item(name, row)
    assert found.prompt == prompt
    assert found.response == response


def test_choices_are_the_responses_and_the_index_points_at_the_right_one() -> None:
    found = item("openbookqa", QUESTION)
    assert found.choices == tuple(f"the correct answer is answer{i}" for i in (1, 2, 3))
    assert found.choices[found.index] == found.response
    assert found.gold == "answer2"


@pytest.mark.parametrize(
    ("name", "row", "prompt", "choices"),
    [
        ("arc_easy", QUESTION, "Question: A cactus stem stores\nAnswer:", (" fruit", " liquid", " food")),
        ("openbookqa", QUESTION, "A cactus stem stores", (" fruit", " liquid", " food")),
        (
            "siqa",
            QUESTION | {"context": "It is dry."},
            "Q: It is dry. A cactus stem stores\nA:",
            (" fruit", " liquid", " food"),
        ),
        (
            "winogrande",
            {"context": "", "question": "Al saw Bo as _ ran.", "choices": ["Al", "Bo"], "answer": 1},
            "Al saw Bo as",
            (" Al ran.", " Bo ran."),
        ),
        (
            "boolq",
            {"context": "A passage.", "question": "is it?", "choices": [], "answer": 1},
            "A passage.\nQuestion: is it?\nAnswer:",
            (" yes", " no"),
        ),
    ],
)
def test_a_cloze_goes_on_in_the_answers_own_words(
    name: str, row: dict[str, Any], prompt: str, choices: tuple[str, ...]
) -> None:
    found = task(name)
    assert isinstance(found, TextTask)
    assert found.cloze is not None
    cloze = found.cloze(row)
    assert (cloze.prompt, cloze.choices, cloze.response) == (prompt, choices, choices[1])


PAIR = {"sentence1": "It rains.", "sentence2": "It is wet"}


@pytest.mark.parametrize(
    ("name", "prompt", "choices"),
    [
        ("cola", "It rains.\nQuestion: Does this sentence make sense?\nAnswer:", (" no", " yes")),
        (
            "sst2",
            "It rains.\nQuestion: Is this sentence positive or negative?\nAnswer:",
            (" negative", " positive"),
        ),
        (
            "mrpc",
            "Sentence 1: It rains.\nSentence 2: It is wet\nQuestion: Do both sentences mean the same thing?\nAnswer:",
            (" no", " yes"),
        ),
        (
            "qqp",
            "Question 1: It rains.\nQuestion 2: It is wet\nQuestion: Do both questions ask the same thing?\nAnswer:",
            (" no", " yes"),
        ),
        (
            "mnli",
            "It rains.\nQuestion: It is wet. True, False or Neither?\nAnswer:",
            (" True", " Neither", " False"),
        ),
        (
            "qnli",
            "It rains.\nIt is wet\nQuestion: Does this response answer the question?\nAnswer:",
            (" yes", " no"),
        ),
        ("rte", "It rains.\nQuestion: It is wet True or False?\nAnswer:", (" True", " False")),
        ("wnli", "It rains.\nQuestion: It is wet True or False?\nAnswer:", (" False", " True")),
    ],
)
def test_glue_as_a_cloze_has_a_word_for_each_class(name: str, prompt: str, choices: tuple[str, ...]) -> None:
    found = task(name)
    assert isinstance(found, PairTask)
    assert found.cloze is not None
    assert len(choices) == found.labels
    for label, word in enumerate(choices):
        cloze = found.cloze(PAIR | {"label": label})
        assert (cloze.prompt, cloze.choices, cloze.response, cloze.index) == (prompt, choices, word, label)


def test_a_hypothesis_of_mnli_ends_with_one_full_stop() -> None:
    found = task("mnli")
    assert isinstance(found, PairTask)
    assert found.cloze is not None
    prompts = {
        found.cloze({"sentence1": "a", "sentence2": text, "label": 0}).prompt for text in ("It is wet", "It is wet. ")
    }
    assert prompts == {"a\nQuestion: It is wet. True, False or Neither?\nAnswer:"}


def test_only_a_score_has_no_words() -> None:
    assert [name for name in SUITES["glue"] if getattr(task(name), "cloze", None) is None] == ["stsb"]


def test_a_preference_pair_learns_the_chosen_and_keeps_the_rejected() -> None:
    found = item("ultrafeedback", {"prompt": "p", "chosen": "yes", "rejected": "no"})
    assert (found.instruction, found.response, found.rejected) == ("p", "yes", "no")


HUB_ROWS: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [
    (
        "boolq",
        {"question": "is it", "passage": "p", "label": 1},
        {"context": "p", "question": "is it", "choices": ["true", "false"], "answer": 0},
    ),
    (
        "piqa",
        {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
        {"context": "", "question": "g", "choices": ["a", "b"], "answer": 1},
    ),
    ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, None),
    (
        "siqa",
        {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "d", "label": "3"},
        {"context": "c", "question": "q", "choices": ["a", "b", "d"], "answer": 2},
    ),
    (
        "hellaswag",
        {"activity_label": "A", "ctx": "C. d", "ctx_a": "C.", "ctx_b": "d", "endings": ["x", "y"], "label": "1"},
        {"context": "", "question": "A: C. d", "choices": ["x", "y"], "answer": 1, "cloze": "A: C. D"},
    ),
    ("hellaswag", {"activity_label": "A", "ctx": "c", "endings": ["x", "y"], "label": ""}, None),
    (
        "winogrande",
        {"sentence": "_", "option1": "a", "option2": "b", "answer": "2"},
        {"context": "", "question": "_", "choices": ["a", "b"], "answer": 1},
    ),
    ("winogrande", {"sentence": "_", "option1": "a", "option2": "b", "answer": ""}, None),
    (
        "arc_challenge",
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        {"context": "", "question": "q", "choices": ["a", "b"], "answer": 1},
    ),
    (
        "openbookqa",
        {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        {"context": "", "question": "q", "choices": ["a", "b"], "answer": 0},
    ),
    ("gsm8k", {"question": "q", "answer": "So.\n#### 1,200"}, {"question": "q", "solution": "So.", "answer": 1200.0}),
    (
        "svamp",
        {"Body": "He has 2", "Question": "How many?", "Equation": "( 2 )", "Answer": "2"},
        {"question": "He has 2. How many?", "solution": "( 2 )", "answer": 2.0},
    ),
    ("multiarith", {"question": " q ", "final_ans": "7"}, {"question": "q", "solution": None, "answer": 7.0}),
    (
        "mawps",
        {"question": "q ", "equation": "x = 2 + 3", "result": "5", "result_float": 5.0, "chain": "<gadget>"},
        {"question": "q", "solution": "x = 2 + 3", "answer": 5.0},
    ),
    (
        "alpaca_eval",
        {"instruction": "i", "output": "o", "generator": "text_davinci_003", "dataset": "helpful_base"},
        {"instruction": "i", "input": "", "output": "o"},
    ),
    (
        "aqua",
        {"question": "q", "options": ["A)5", "B)6"], "correct": "B"},
        {"question": "q", "choices": ["5", "6"], "answer": 1},
    ),
    (
        "alpaca",
        {"instruction": "i", "input": "", "output": "o", "text": "t"},
        {"instruction": "i", "input": "", "output": "o"},
    ),
    (
        "ultrafeedback",
        {
            "prompt": "p",
            "chosen": [{"content": "p"}, {"content": "c"}],
            "rejected": [{"content": "p"}, {"content": "r"}],
        },
        {"prompt": "p", "chosen": "c", "rejected": "r"},
    ),
    ("cola", {"sentence": "s", "label": 1, "idx": 0}, {"sentence1": "s", "sentence2": None, "label": 1}),
    ("mnli", {"premise": "a", "hypothesis": "b", "label": 2}, {"sentence1": "a", "sentence2": "b", "label": 2}),
]


@pytest.mark.parametrize(("name", "theirs", "ours"), HUB_ROWS, ids=lambda v: v if isinstance(v, str) else "")
def test_rows_of_the_hub_become_ours(name: str, theirs: dict[str, Any], ours: dict[str, Any] | None) -> None:
    hub = task(name).hub
    assert hub is not None
    assert hub.row(theirs) == ours
    if ours is not None and isinstance(task(name), TextTask):
        assert item(name, ours).response
