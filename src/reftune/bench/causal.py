"""Text tasks on a causal model, GLUE as a cloze among them: one training, then every task scored."""

import time
from typing import Any

import torch
from transformers import set_seed

from reftune.data import PromptTemplate, ReftDataCollator
from reftune.models import load_model

from . import scoring
from .judge import make_judge, win_rate
from .methods import Counts
from .metrics import glue_scores, right
from .room import positions, shortened
from .runs import Setup, train_method
from .tasks import Item, PairTask, TextTask, task
from .tasks.base import LOSS
from .tasks.instruct import WIN_RATE
from .training import Fit

Result = tuple[Counts, Fit, dict[str, dict[str, float]], dict[str, float], dict[str, float]]


def run(setup: Setup) -> Result:
    """One run: counts, training, {task: metrics} on the test rows, the selection metrics, seconds."""
    job = setup.job
    started = time.perf_counter()
    model, tokenizer = load_model(job.model, dtype=job.settings["dtype"], attn_implementation=job.settings["attention"])
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    model.config.use_cache = False
    loaded = time.perf_counter()
    setup.fit_in(positions(model))
    words = Words(tokenizer, job.settings["template"])
    if any(_generates(name, words, setup) for name in job.tasks):  # said before training, not after it
        shortened([], setup.room, setup.scoring.max_new_tokens)
    rows = _training_rows(setup, words)
    collator = ReftDataCollator(tokenizer)
    model, counts, fitted = train_method(setup, model, rows, collator, [])
    model.config.use_cache = True
    begun, cpu = time.perf_counter(), time.process_time()
    set_seed(job.seed)  # answers may be sampled: not by what training left of the generator's state
    with torch.autocast(model.device.type, torch.bfloat16, enabled=setup.train.bf16):
        held = [item for name in job.train_tasks for item in words.items(name, setup.parts[name].select)]
        selection = {"loss": mean_loss(model, words, held, collator, setup)} if held else {}
        if setup.job.settings["sweep"]["by"] == "score" and job.stage == "sweep":
            scores = [
                evaluate(model, words, name, words.items(name, setup.parts[name].select), collator, setup)
                for name in job.train_tasks
            ]
            firsts = [_first(name, found) for name, found in zip(job.train_tasks, scores, strict=True)]
            selection["score"] = sum(firsts) / len(firsts)
        metrics: dict[str, dict[str, float]] = {}
        for name in job.tasks if job.stage == "final" else ():
            metrics[name] = evaluate(model, words, name, words.items(name, setup.parts[name].test), collator, setup)
    seconds = {
        "load": loaded - started,
        "evaluate": time.perf_counter() - begun,
        "evaluate_cpu": time.process_time() - cpu,
    }
    return counts, fitted, metrics, selection, seconds


def _training_rows(setup: Setup, words: "Words") -> list[dict[str, list[int]]]:
    """The rows of all tasks as token ids; how many were left out or cut is noted in `setup.lengths`."""
    longest = setup.train.max_length
    rows: list[dict[str, list[int]]] = []
    for name in setup.job.train_tasks:
        each = [words.training_row(item, longest) for item in words.items(name, setup.parts[name].train)]
        kept = [row for row, _ in each if row is not None]
        setup.lengths.setdefault(name, {}).update(left_out=len(each) - len(kept), cut=sum(cut for _, cut in each))
        rows += kept
    if not rows and setup.job.method.method != "base":
        more = "Raise train.max_length." if longest != setup.room else "Take a model that reads more."
        full = ", and the model has positions for no more" if longest == setup.room else ""
        raise ValueError(f"No training row is left: every prompt has {longest} tokens or more{full}. {more}")
    return rows


def _first(name: str, scores: dict[str, float]) -> float:
    """The first of a task's metrics that was measured, higher being better."""
    metric = next(m for m in (*task(name).metrics, LOSS) if m.name in scores)
    return scores[metric.name] if metric.higher else -scores[metric.name]


class Words:
    """Rows to items to token ids: in the paper's words, through the model's chat template, or as a cloze."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.chat, self.cloze = template == "chat", template == "cloze"
        self._template = PromptTemplate(tokenizer, "chat" if self.chat else "plain")

    def items(self, name: str, rows: list[dict[str, Any]]) -> list[Item]:
        """The examples of a text task's rows."""
        found = task(name)
        if isinstance(found, TextTask) and not self.cloze:
            return [found.item(row) for row in rows]
        assert found.cloze is not None  # see `check_values`
        return [found.cloze(row) for row in rows]

    def prompt(self, item: Item) -> list[int]:
        """The ids before the answer."""
        ids = self._template.prompt_ids(item.instruction if self.chat else item.prompt)
        if ids or not self.cloze:
            return ids
        starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)  # as lm-evaluation-harness, if it is empty
        return [token for token in starts if token is not None][:1]

    def response(self, item: Item, text: str) -> list[int]:
        """The ids of an answer, with what ends it; in a cloze nothing does, as in lm-evaluation-harness."""
        if self.cloze:  # by itself SentencePiece would begin it with a second space
            prompt, whole = self.prompt(item), self._template.prompt_ids(item.prompt + text)
            if whole[: len(prompt)] == prompt:
                return whole[len(prompt) :]
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._template.response_ids(item.instruction if self.chat else item.prompt, text)

    def training_row(self, item: Item, max_length: int) -> tuple[dict[str, list[int]] | None, bool]:
        """Ids and labels, None where the prompt leaves no room; and whether the response was cut at `max_length`."""
        prompt, response = self.prompt(item), self.response(item, item.response)
        room = max_length - len(prompt)
        if room < 1:
            return None, False
        row = {"input_ids": prompt + response[:room], "labels": [-100] * len(prompt) + response[:room]}
        return row, len(response) > room


def evaluate(
    model: Any, words: Words, name: str, examples: list[Item], collator: Any, setup: Setup
) -> dict[str, float]:
    """All metrics of a task that the grid's scoring asks for."""
    found, how = task(name), setup.scoring
    scores: dict[str, float] = {}
    prompts = [words.prompt(item) for item in examples]
    if isinstance(found, PairTask):
        each, loss = _choose(model, words, name, prompts, examples, setup)
        return {**glue_scores(name, _likeliest(each), [item.index for item in examples]), "loss": loss}
    if found.kind == "choice" and how.loglikelihood:
        each, scores["loss"] = _choose(model, words, name, prompts, examples, setup)
        scores["accuracy_ll"] = _share_right(each, examples)
        if words.cloze:  # by the letter, as lm-evaluation-harness's acc_norm: the sum over tokens favours short answers
            lengths = [[len(text.strip()) for text in item.choices] for item in examples]
            shared = [
                [s / max(1, n) for s, n in zip(row, ns, strict=True)] for row, ns in zip(each, lengths, strict=True)
            ]
            scores["accuracy_norm"] = _share_right(shared, examples)
    else:
        scores["loss"] = mean_loss(model, words, examples, collator, setup)
    if examples[0].rejected is not None:
        scores |= preference(model, words, examples, collator, setup)
    if _generates(name, words, setup):
        judge = make_judge(how.judge) if WIN_RATE in found.metrics else None
        answers = scoring.generate(
            model,
            words.tokenizer,
            _shortened(setup, name, prompts, how.max_new_tokens),
            max_new_tokens=how.max_new_tokens,
            batch_size=how.batch_size,
            **how.generation,
        )
        if judge is not None:
            asked, references = [i.instruction for i in examples], [str(i.gold) for i in examples]
            scores |= win_rate(judge, asked, answers, references)
        else:
            scored = [right(found.kind, a, i.gold) for a, i in zip(answers, examples, strict=True)]
            scores["accuracy"] = sum(scored) / len(scored)
    return scores


def _generates(name: str, words: Words, setup: Setup) -> bool:
    found, how = task(name), setup.scoring
    if isinstance(found, PairTask) or words.cloze:
        return False
    return how.generate if found.kind != "free" else how.judge is not None and WIN_RATE in found.metrics


def _shortened(setup: Setup, name: str, prompts: list[list[int]], answer: int) -> list[list[int]]:
    prompts, cut = shortened(prompts, setup.room, answer)
    seen = setup.lengths.setdefault(name, {})
    # likelihoods and generation leave room for other answers
    seen["prompts_cut"] = max(cut, seen.get("prompts_cut", 0))
    return prompts


def _choose(
    model: Any, words: Words, name: str, prompts: list[list[int]], examples: list[Item], setup: Setup
) -> tuple[list[list[float]], float]:
    """The log-likelihoods of every example's choices, and the loss of a token of the right ones."""
    choices = [[words.response(item, text) for text in item.choices] for item in examples]
    prompts = _shortened(setup, name, prompts, max(len(ids) for row in choices for ids in row))
    pad, size = scoring.pad_of(words.tokenizer), setup.scoring.batch_size
    each = scoring.choice_scores(model, prompts, choices, pad, size)
    golds = [(row[i.index], len(ids[i.index])) for row, i, ids in zip(each, examples, choices, strict=True)]
    return each, -sum(total for total, _ in golds) / sum(count for _, count in golds)


def _likeliest(scores: list[list[float]]) -> list[int]:
    return [max(range(len(row)), key=row.__getitem__) for row in scores]


def _share_right(scores: list[list[float]], examples: list[Item]) -> float:
    return sum(b == item.index for b, item in zip(_likeliest(scores), examples, strict=True)) / len(examples)


def mean_loss(model: Any, words: Words, examples: list[Item], collator: Any, setup: Setup) -> float:
    """Mean negative log-likelihood of a response token, in nats, over all responses."""
    pairs = _pairs(words, examples, [item.response for item in examples], setup)
    found = scoring.continuation_scores(model, pairs, collator, setup.scoring.batch_size)
    return -sum(total for total, _ in found) / max(1, sum(count for _, count in found))


def preference(model: Any, words: Words, examples: list[Item], collator: Any, setup: Setup) -> dict[str, float]:
    """How often the chosen answer is likelier per token than the rejected one, and the mean margin (nats a token).

    Per token, because the sum over tokens mostly compares lengths; `margin_sum` is the mean of that one.
    """
    size = setup.scoring.batch_size
    chosen = scoring.continuation_scores(
        model, _pairs(words, examples, [i.response for i in examples], setup), collator, size
    )
    rejected = scoring.continuation_scores(
        model, _pairs(words, examples, [str(i.rejected) for i in examples], setup), collator, size
    )
    each = [a / n - b / m for (a, n), (b, m) in zip(chosen, rejected, strict=True)]
    sums = [a - b for (a, _), (b, _) in zip(chosen, rejected, strict=True)]
    return {
        "preference": sum(d > 0 for d in each) / len(each),
        "margin": sum(each) / len(each),
        "margin_sum": sum(sums) / len(sums),
    }


def _pairs(words: Words, examples: list[Item], texts: list[str], setup: Setup) -> list[tuple[list[int], list[int]]]:
    """Prompts with their responses, cut as in training; a prompt that leaves no room keeps its last tokens."""
    longest = setup.train.max_length
    pairs = []
    for item, text in zip(examples, texts, strict=True):
        prompt, response = words.prompt(item), words.response(item, text)
        prompt = prompt[-(longest - 1) :]
        pairs.append((prompt, response[: longest - len(prompt)]))
    return pairs
