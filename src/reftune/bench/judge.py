"""Win rate: a judge compares an answer with a reference answer, in both orders.

    EndpointJudge("https://host/v1", "model-name", key_env="OPENAI_API_KEY")      # any OpenAI-compatible endpoint
    RewardJudge("path/of/a/reward/model")                                       # a local sequence classifier, 1 output

`win_rate(judge, instructions, answers, references)` is the mean of 1 for a win, 1/2 for a tie or for verdicts that
change with the order, 0 for a loss.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

PROMPT = """Two assistants answered the instruction below. Judge which answer is better: which one a person would \
rather have received, for being helpful, correct and to the point. Length alone is no merit, and neither is the order.

# Instruction
{instruction}

# Answer A
{a}

# Answer B
{b}

Reply with one word: A, B, or tie."""


class Judge(Protocol):
    """Says which of two answers is better."""

    name: str

    def prefers(self, instruction: str, a: str, b: str) -> float:
        """1.0 if `a` is better, 0.0 if `b` is, 0.5 for a tie."""


class EndpointJudge:
    """A chat model behind an OpenAI-compatible HTTP endpoint.

    Args:
        url: the base, up to and including `/v1`.
        model: the model's name there.
        key_env: environment variable that holds the key; None sends none.
        retries: attempts after errors 429 and 5xx and broken connections, with pauses that double from `pause` seconds.

    Raises:
        ValueError: the key is missing, or an answer of the endpoint holds no verdict.
        ConnectionError: the endpoint did not answer after all attempts.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str | None = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 4,
        pause: float = 1.0,
    ) -> None:
        self.name, self.url, self.model = model, url.rstrip("/"), model
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self._key = os.environ.get(key_env) if key_env else None
        if key_env and not self._key:
            raise ValueError(f"The judge's key is to be in ${key_env}, which is not set. Set it, or key_env: null.")

    def prefers(self, instruction: str, a: str, b: str) -> float:
        """1.0 if `a` is better, 0.0 if `b` is, 0.5 for a tie."""
        content = PROMPT.format(instruction=instruction, a=a, b=b)
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        return verdict(self._ask(body)["choices"][0]["message"]["content"])

    def _ask(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                said = f"{error.code}: {error.read().decode(errors='replace')[:200]}"
                if error.code != 429 and error.code < 500:
                    raise ValueError(f"The judge at {self.url} refused the request, {said}") from error
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                said = str(error)
            if attempt < self.retries:
                time.sleep(self.pause * 2**attempt)
        raise ConnectionError(f"The judge at {self.url} did not answer in {self.retries + 1} attempts: {said}")


class RewardJudge:
    """A local reward or preference model: sequence classification with one output, higher is better.

    A chat template of its tokenizer is used; without one the instruction and the answer are a pair of texts.
    """

    def __init__(self, model: str, *, max_length: int = 1024) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.name, self.max_length = model, max_length
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSequenceClassification.from_pretrained(model).eval()
        if self.model.config.num_labels != 1:
            raise ValueError(f"{model} has {self.model.config.num_labels} outputs; a reward model has one.")

    def reward(self, instruction: str, answer: str) -> float:
        """The model's score of an answer."""
        import torch

        turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
        if getattr(self.tokenizer, "chat_template", None):
            texts: Any = (self.tokenizer.apply_chat_template(turns, tokenize=False),)
        else:
            texts = (instruction, answer)
        inputs = self.tokenizer(*texts, return_tensors="pt", truncation=True, max_length=self.max_length)
        with torch.no_grad():
            return float(self.model(**inputs).logits[0, 0])

    def prefers(self, instruction: str, a: str, b: str) -> float:
        """1.0 if `a` is better, 0.0 if `b` is, 0.5 for a tie."""
        first, second = self.reward(instruction, a), self.reward(instruction, b)
        return 0.5 if first == second else float(first > second)


def verdict(text: str) -> float:
    """1.0, 0.0 or 0.5 of a judge's words: the first A, B or tie that stands alone."""
    found = re.search(r"\b(A|B|[Tt]ie|TIE)\b", text)
    if not found:
        raise ValueError(f"The judge's reply names neither A, B nor tie: {text[:200]!r}.")
    return {"A": 1.0, "B": 0.0}.get(found[1], 0.5)


def win_rate(judge: Judge, instructions: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> float:
    """The mean verdict over both orders, so that a judge's taste for the first place cancels."""
    total = 0.0
    for instruction, answer, reference in zip(instructions, answers, references, strict=True):
        total += judge.prefers(instruction, answer, reference) / 2
        total += (1 - judge.prefers(instruction, reference, answer)) / 2
    return total / len(answers)


def make_judge(settings: Mapping[str, Any] | None) -> Judge | None:
    """A judge of a grid's `scoring.judge`: {reward_model: ...} or {url:, model:, key_env: ...}; None without."""
    if settings is None:
        return None
    given = dict(settings)
    try:
        if "reward_model" in given:
            return RewardJudge(given.pop("reward_model"), **given)
        return EndpointJudge(given.pop("url"), given.pop("model"), **given)
    except (KeyError, TypeError) as error:
        raise ValueError(f"scoring.judge is {{reward_model:}} or {{url:, model:, key_env:}}, but: {error}.") from error
