"""Messages to token ids, the same for training and generation, and examples to `input_ids` + `labels`.

    template = PromptTemplate(tokenizer)                       # the tokenizer's chat template if it has one
    template.prompt_ids([{"role": "user", "content": "Hi"}])   # what `generate` is given
    tokenize(rows, template, max_length=512)                   # prompt_ids + response ids, the prompt labelled -100

The prompt is tokenised by itself, by the call that generation uses, and the response by itself: were the two tokenised
as one text, a token could span their seam and the edited suffix would be another than at generation.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reftune.data.columns import Example, Message, find_columns
from reftune.models import apply_chat_template

IGNORE = -100


@dataclass(frozen=True)
class PromptTemplate:
    """How messages become tokens.

    Args:
        tokenizer: a transformers tokenizer.
        kind: "chat" is the tokenizer's chat template; "plain" the text of a single message as it stands; "auto" is
            "chat" if the tokenizer has a chat template.
        system: a system message to put first where there is none.
    """

    tokenizer: Any
    kind: Literal["auto", "chat", "plain"] = "auto"
    system: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "chat", "plain"):
            raise ValueError(f'The template is "auto", "chat" or "plain", but is {self.kind!r}.')
        if self.kind == "chat" and not self._has_chat:
            raise ValueError('The template is "chat", but the tokenizer has no chat template: use "plain".')
        if not self.is_chat and self.system is not None:
            raise ValueError("A system message needs a chat template, and this template is plain.")

    @property
    def _has_chat(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def is_chat(self) -> bool:
        """Whether the chat template is used."""
        return self._has_chat if self.kind == "auto" else self.kind == "chat"

    def prompt_ids(self, messages: Sequence[Message] | str) -> list[int]:
        """The token ids before the answer; a text is one user message."""
        turns = self._turns(messages)
        if self.is_chat:
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
            return list(apply_chat_template(self.tokenizer, turns, **options))
        return list(self.tokenizer(self._plain(turns))["input_ids"])

    def response_ids(self, messages: Sequence[Message] | str, response: str) -> list[int]:
        """The token ids of the answer, with the token that ends the turn last."""
        text = response
        if self.is_chat:
            turns = self._turns(messages)
            prompt = apply_chat_template(self.tokenizer, turns, add_generation_prompt=True, tokenize=False)
            whole = apply_chat_template(
                self.tokenizer, [*turns, {"role": "assistant", "content": response}], tokenize=False
            )
            if whole.startswith(prompt):  # else the template rewrites the prompt: the bare response and EOS then
                text = whole[len(prompt) :]
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._end_turn(ids)

    def _end_turn(self, ids: list[int]) -> list[int]:
        """Cut what the template puts after the end of the turn (a line break); add EOS if nothing ends it."""
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in special), None)
        if self.is_chat and last is not None and not self.tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]

    def _turns(self, messages: Sequence[Message] | str) -> list[Message]:
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        if not turns:
            raise ValueError("There are no messages: a prompt is needed.")
        if self.system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        if self.is_chat and turns[0]["role"] == "system" and not self._reads_system:
            raise ValueError(
                "The model's chat template leaves system messages out without a word. Leave out data.system "
                "(--system), or the message, or write it into the first user's."
            )
        return turns

    @functools.cached_property
    def _reads_system(self) -> bool:
        """Whether a system message changes what the chat template writes."""
        user = {"role": "user", "content": "x"}
        try:
            texts = [
                apply_chat_template(self.tokenizer, turns, add_generation_prompt=True, tokenize=False)
                for turns in ([{"role": "system", "content": "Reply in rhymes."}, user], [user])
            ]
        except ValueError:  # it refuses, and will say so of the real ones
            return True
        return bool(texts[0] != texts[1])

    def _plain(self, turns: list[Message]) -> str:
        if len(turns) != 1:
            raise ValueError(
                f"This prompt is a chat of {len(turns)} messages and the template is plain. Use a model whose "
                "tokenizer has a chat template, or prompt + completion columns."
            )
        return turns[0]["content"]


def some(prompt: list[int]) -> list[int]:
    """The tokens of a prompt; ValueError if it has none."""
    if not prompt:
        raise ValueError("The prompt is empty, and the tokenizer puts nothing before it: no token is there to edit.")
    return prompt


@dataclass(frozen=True)
class TokenizedRows:
    """Training rows, and how many of the data's rows were cut or left out.

    rows: a list of {"input_ids", "labels"}, both lists of ints of one length; labels are -100 on the prompt.
    skipped: rows whose prompt left no room for a response. truncated: rows whose response was cut.
    """

    rows: list[dict[str, list[int]]]
    skipped: int = 0
    truncated: int = 0


def tokenize(
    data: Any, template: PromptTemplate, *, max_length: int = 512, columns: Mapping[str, str] | None = None
) -> TokenizedRows:
    """Tokenise every row of a `datasets.Dataset` (or a list of dicts, or of `Example`) for training.

    A response that passes `max_length` is cut, and then has no end of turn; a row whose prompt leaves no room for any
    response is left out, with a warning that says how many. The prompt is never cut: its last tokens are the edited
    ones.

    Raises:
        ValueError: unknown columns, a bad row (its number is given), or no row left.
    """
    rows: list[dict[str, list[int]]] = []
    skipped = truncated = 0
    names = getattr(data, "column_names", None)
    read = find_columns(names, columns) if names is not None else None
    for number, row in enumerate(data):
        try:
            example = row if isinstance(row, Example) else (read or find_columns(row, columns))(row)
            prompt = some(template.prompt_ids(example.messages))
            response = template.response_ids(example.messages, example.response)
        except ValueError as error:
            raise ValueError(f"Row {number} of the data: {error}") from error
        room = max_length - len(prompt)
        if room < 1:
            skipped += 1
            continue
        truncated += len(response) > room
        response = response[:room]
        rows.append({"input_ids": prompt + response, "labels": [IGNORE] * len(prompt) + response})
    total = len(rows) + skipped
    if not rows:
        why = f"all {total} prompts fill max_length={max_length}: raise it" if total else "it has no rows"
        raise ValueError(f"The data leaves nothing to train on, for {why}.")
    if skipped:
        warnings.warn(
            f"{skipped} of {total} rows are left out: their prompt leaves no room for a response within "
            f"max_length={max_length}.",
            UserWarning,
            stacklevel=2,
        )
    return TokenizedRows(rows, skipped, truncated)
