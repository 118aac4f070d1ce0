"""Answers as a cloze: no end of turn, compared by the letter; GLUE by its own metrics."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from tests.tiny_chat import tiny_tokenizer

from reftune.bench import scoring
from reftune.bench.causal import Words, evaluate
from reftune.bench.grid import ScoringSection

ROW = {"context": "", "question": "abc", "choices": ["a", "abababab"], "answer": 1}


def test_a_cloze_ends_nowhere() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    paper, cloze = (Words(tokenizer, kind) for kind in ("paper", "cloze"))
    (item,) = cloze.items("arc_easy", [ROW])
    ids = cloze.response(item, item.response)
    assert tokenizer.decode(ids) == item.response == " abababab"
    assert paper.response(item, item.response) == [*ids, tokenizer.eos_token_id]
    assert paper.items("arc_easy", [ROW])[0].response == "the correct answer is answer2"


def llama_like() -> Any:
    """A tokenizer of characters that begins every text with a space, as those of LLaMA and Llama-2 do."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "</s>", "<unk>", *"\u2581abcdefghijklmnopqrstuvwxyzQA:?\n", "\u2581y", "\u2581\u2581"]
    merges = [("\u2581", "y"), ("\u2581", "\u2581")]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=merges, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_cloze_goes_on_in_the_tokens_of_the_whole_text() -> None:
    """As in lm-evaluation-harness: a tokenizer that begins a text with a space would put two before an answer."""
    for tokenizer in (llama_like(), tiny_tokenizer(chat=False)):
        words = Words(tokenizer, "cloze")
        (item,) = words.items("boolq", [{"context": "b", "question": "is it", "answer": 0}])
        for text in item.choices:
            whole = tokenizer(item.prompt + text)["input_ids"]
            assert words.prompt(item) + words.response(item, text) == whole
    merged = tiny_tokenizer(chat=False)  # "aa" is one token: over the seam the answer keeps its own
    (item,) = Words(merged, "cloze").items("arc_easy", [ROW])
    seam = dataclasses.replace(item, prompt="ba")
    assert Words(merged, "cloze").response(seam, "ab") == merged("ab")["input_ids"]


def test_hellaswags_marks_are_read_in_the_papers_wording_alone() -> None:
    asked = "Health: [header] How to sleep [title] Cool the room. [step] Most people sleep better."
    row = {"question": asked, "choices": ["[substeps] Open it.", " Go [name] on."], "answer": 0}
    tokenizer = tiny_tokenizer(chat=False)
    (paper,), (cloze,) = (Words(tokenizer, kind).items("hellaswag", [row]) for kind in ("paper", "cloze"))
    assert asked in paper.prompt
    assert "Ending1: [substeps] Open it. Ending2:" in paper.prompt
    assert cloze.prompt == "Health: How to sleep. Cool the room. Most people sleep better."
    assert cloze.choices == (" Open it.", " Go on.")
    (hub,) = Words(tokenizer, "cloze").items("hellaswag", [row | {"cloze": "Health: Sleep. [step] Most do."}])
    assert hub.prompt == "Health: Sleep. Most do."


def test_a_cloze_that_begins_with_its_blank_follows_a_special_token() -> None:
    """As in lm-evaluation-harness: the first word of an answer is predicted from something."""
    tokenizer = tiny_tokenizer(chat=False)
    words = Words(tokenizer, "cloze")
    (item,) = words.items("winogrande", [{"question": "_ is here", "choices": ["a", "b"], "answer": 0}])
    assert (item.prompt, words.prompt(item)) == ("", [tokenizer.bos_token_id])
    assert tokenizer.decode(words.response(item, item.response)) == " a is here"
    tokenizer.bos_token = None
    assert words.prompt(item) == [tokenizer.eos_token_id]


def test_glue_as_a_cloze_is_scored_by_its_own_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words(tiny_tokenizer(chat=False), "cloze")
    items = words.items("cola", [{"sentence1": "a", "sentence2": None, "label": label} for label in (0, 1, 1, 1)])
    monkeypatch.setattr(scoring, "choice_scores", lambda *_: [[-1.0, -2.0], [-2.0, -1.0], [-2.0, -1.0], [-1.0, -2.0]])
    setup: Any = SimpleNamespace(scoring=ScoringSection(), room=None, lengths={})
    found = evaluate(None, words, "cola", items, None, setup)
    assert found["accuracy"] == 0.75
    assert found["matthews"] == pytest.approx((1 * 2 - 0 * 1) / (2 * 3 * 1 * 2) ** 0.5)
    tokens = sum(len(words.response(item, item.response)) for item in items)
    assert found["loss"] == pytest.approx((1 + 1 + 1 + 2) / tokens)


def test_a_short_wrong_answer_wins_in_all_and_not_by_the_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words(tiny_tokenizer(chat=False), "cloze")
    monkeypatch.setattr(scoring, "choice_scores", lambda *_: [[-5.0, -6.0]])
    monkeypatch.setattr(scoring, "generate", lambda *_, **__: pytest.fail("nothing is generated"))
    setup: Any = SimpleNamespace(scoring=ScoringSection(), room=None, lengths={})
    items = words.items("arc_easy", [ROW])
    found = evaluate(None, words, "arc_easy", items, None, setup)
    assert (found["accuracy_ll"], found["accuracy_norm"]) == (0.0, 1.0)
    assert found["loss"] == pytest.approx(6 / len(words.response(items[0], " abababab")))
