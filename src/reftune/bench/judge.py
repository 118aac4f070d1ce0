"""Win rate: a judge compares an answer with a reference answer, in both orders.

    EndpointJudge("https://host/v1", "model-name", key_env="OPENAI_API_KEY")      # any OpenAI-compatible endpoint
    RewardJudge("path/of/a/reward/model")                                       # a local sequence classifier, 1 output

`win_rate(judge, instructions, answers, references)` is the mean of 1 for a win, 1/2 for a tie or for verdicts that
change with the order, 0 for a loss. A reply without a verdict is asked for once more, then counts as a tie; when over a
tenth of the replies are such, there is no win rate but an error.
"""

import http.client
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


class UnreadableError(ValueError):
    """A judge's reply that names no verdict, or several."""


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
        retries: attempts after errors 429 and 5xx, broken connections and replies that are no JSON, with pauses that
            double from `pause` seconds.

    Raises:
        ValueError: the key is missing, the endpoint refuses a request, or its reply is not a chat completion's.
        UnreadableError: two replies in a row hold no verdict.
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
        try:
            return verdict(self._words(body))
        except UnreadableError:
            return verdict(self._words(body | {"temperature": 1}))  # at 0 it would say the same again

    def _words(self, body: Mapping[str, Any]) -> str:
        reply = self._ask(body)
        try:
            return str(reply["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"The judge at {self.url} gave no chat completion: {str(reply)[:200]}") from error

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
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                said = str(error)
            except ValueError as error:  # a proxy's page, for example
                said = f"what it gave is no JSON, {error}"
            if attempt < self.retries:
                time.sleep(self.pause * 2**attempt)
        raise ConnectionError(f"The judge at {self.url} did not answer in {self.retries + 1} attempts: {said}")


class RewardJudge:
    """A local reward or preference model: sequence classification with one output, higher is better.

    A chat template of its tokenizer is used; without one the instruction and the answer are a pair of texts. What is
    longer than `max_length` loses the beginning of the instruction, in a pair the end of the longer text.
    """

    def __init__(self, model: str, *, max_length: int = 1024) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.name, self.max_length = model, max_length
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSequenceClassification.from_pretrained(model).eval()
        _one_output(model, self.model.config)
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())

    def reward(self, instruction: str, answer: str) -> float:
        """The model's score of an answer."""
        import torch

        turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
        how: dict[str, Any] = {"return_tensors": "pt", "truncation": True, "max_length": self.max_length}
        if getattr(self.tokenizer, "chat_template", None):  # which writes the special tokens itself
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            self.tokenizer.truncation_side = "left"  # of what is too long the answer, which is judged, stays
            inputs = self.tokenizer(text, add_special_tokens=False, **how)
        else:
            inputs = self.tokenizer(instruction, answer, **how)
        with torch.no_grad():
            return float(self.model(**inputs.to(self.model.device)).logits[0, 0])

    def prefers(self, instruction: str, a: str, b: str) -> float:
        """1.0 if `a` is better, 0.0 if `b` is, 0.5 for a tie."""
        first, second = self.reward(instruction, a), self.reward(instruction, b)
        return 0.5 if first == second else float(first > second)


def verdict(text: str) -> float:
    """1.0, 0.0 or 0.5 of a judge's words, without what it thought aloud.

    A reply that is A, B or tie alone is that; else what stands at the end after a colon or on a line of its own; else
    the one that the text names. Raises UnreadableError for none or several.
    """
    said = re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL).strip()
    last = re.search(r"(?:^|[:\n])[\W_]*(a|b|tie)[\W_]*$", said, flags=re.IGNORECASE)
    named = {word.upper() for word in re.findall(r"\b(?:A(?! tie)|B|[Tt]ie|TIE)\b", said)}
    if last:
        named = {last[1].upper()}
    if len(named) != 1:
        raise UnreadableError(
            f"The judge's reply names {'neither A, B nor' if not named else 'several of A, B and'} tie: {text[:200]!r}."
        )
    return {"A": 1.0, "B": 0.0}.get(named.pop(), 0.5)


def win_rate(
    judge: Judge, instructions: Sequence[str], answers: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """{"win_rate": the mean verdict over both orders, so that a judge's taste for the first place cancels}.

    Where replies were unreadable there is "unreadable" too, their share, and they count as ties. Raises UnreadableError
    if they are more than a tenth.
    """
    verdicts: list[float] = []
    lost: list[UnreadableError] = []

    def ask(instruction: str, a: str, b: str) -> float:
        try:
            return judge.prefers(instruction, a, b)
        except UnreadableError as error:
            lost.append(error)
            if len(lost) > max(2, 0.2 * len(answers)):  # of two verdicts an answer, a tenth
                raise UnreadableError(
                    f"{len(lost)} of {len(verdicts)} replies had no verdict; the last: {error}"
                ) from error
            return 0.5

    for instruction, answer, reference in zip(instructions, answers, references, strict=True):
        verdicts.append(ask(instruction, answer, reference))
        verdicts.append(1 - ask(instruction, reference, answer))
    found = {"win_rate": sum(verdicts) / len(verdicts)}
    return found | ({"unreadable": len(lost) / len(verdicts)} if lost else {})


def check_judge(settings: Mapping[str, Any] | None) -> None:
    """Raise what `make_judge` would, without loading a reward model: to be called before hours of training."""
    if settings is None or "reward_model" not in settings:
        make_judge(settings)
        return
    unknown = set(settings) - {"reward_model", "max_length"}
    if unknown:
        raise ValueError(f"scoring.judge is {{reward_model:, max_length:}}, but has {', '.join(sorted(unknown))}.")
    from transformers import AutoConfig

    _one_output(str(settings["reward_model"]), AutoConfig.from_pretrained(settings["reward_model"]))


def _one_output(name: str, config: Any) -> None:
    if config.num_labels != 1:
        raise ValueError(f"{name} has {config.num_labels} outputs; a reward model has one.")


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
