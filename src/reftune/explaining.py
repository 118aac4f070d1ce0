"""See it: `print(reftune.explain(model, tokenizer, "text"))` shows which tokens are edited, and at which layers."""

from dataclasses import dataclass
from typing import Any, overload

from .models import apply_chat_template
from .sites import number_ranges
from .tuner.explain import Edit, explain_tokens

CONTINUES = "\u22ef"  # stands for a token that continues the character of the one before it, as in emoji


@dataclass(frozen=True)
class Explanation:
    """One text as the model reads it: its tokens, and the edits of each column of it."""

    tokens: tuple[str, ...]
    edits: tuple[Edit, ...]
    prompt: int  # number of prompt tokens; what follows are generated ones

    def at(self, column: int) -> tuple[Edit, ...]:
        """The edits made at one token."""
        return tuple(edit for edit in self.edits if column in edit.columns)

    def where(self, column: int) -> str:
        """The edits of one token in short, such as "f2 · layers 10, 15" or "l1 · layer 3 mlp.output"."""
        layers: dict[tuple[str, str], list[int]] = {}
        for edit in self.at(column):
            path = edit.site if edit.layer is None else edit.site.split(f".{edit.layer}.", 1)[1]
            layers.setdefault((edit.group, path), []).extend([] if edit.layer is None else [edit.layer])
        parts = []
        for (group, path), found in layers.items():
            numbers = f"layer{'s' * (len(found) > 1)} {number_ranges(found)}" if found else ""
            parts.append(f"{group} · {numbers} {'' if numbers and path == 'output' else path}".strip())
        return ", ".join(parts)

    def __str__(self) -> str:
        width = max((len(token) for token in self.tokens), default=0)
        lines = []
        for column, token in enumerate(self.tokens):
            what = "prompt" if column < self.prompt else "answer"
            mark = "*" if self.at(column) else " "
            lines.append(f"{mark} {column:4d}  {what}  {token:<{width}}  {self.where(column)}".rstrip())
        return "\n".join(lines)


@overload
def explain(
    model: Any,
    tokenizer: Any,
    text: str | list[dict[str, str]],
    answer: str = "",
    adapter_name: str | None = None,
    chat_template: bool | None = None,
) -> Explanation: ...
@overload
def explain(
    model: Any,
    tokenizer: Any,
    text: list[str],
    answer: str = "",
    adapter_name: str | None = None,
    chat_template: bool | None = None,
) -> list[Explanation]: ...
def explain(
    model: Any,
    tokenizer: Any,
    text: str | list[dict[str, str]] | list[str],
    answer: str = "",
    adapter_name: str | None = None,
    chat_template: bool | None = None,
) -> Explanation | list[Explanation]:
    """What the adapter edits in a prompt (and in an answer to it); the model is not run.

    Args:
        model: a PeftModel with a ReFT adapter.
        tokenizer: its tokenizer; the chat template is used where it has one, unless `chat_template=False`.
        text: a prompt, or chat messages; a list of prompts gives a list. Padding moves no edit to another token, so
            that each is explained as it stands, whatever batch it will be in.
        answer: tokens that the model has generated, to see what `gen` and `all` edit.
        adapter_name: those that act if None, the active ones or the composition that is on; none where they are
            disabled.

    Raises ValueError for a text without tokens, messages that the chat template refuses, or an unknown adapter.
    """
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        texts = [str(part) for part in text]
        return [explain(model, tokenizer, part, answer, adapter_name, chat_template) for part in texts]
    if chat_template is None:
        chat_template = getattr(tokenizer, "chat_template", None) is not None
    if chat_template or not isinstance(text, str):
        messages: Any = [{"role": "user", "content": text}] if isinstance(text, str) else text
        encoded = apply_chat_template(
            tokenizer, messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(text, return_tensors="pt")
    ids = encoded["input_ids"]
    prompt = ids.shape[1]
    if prompt == 0:
        raise ValueError("The text has no tokens, so there is nothing to edit: pass a prompt of at least one token.")
    if answer:
        more = tokenizer(answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
        ids = ids.new_tensor([ids[0].tolist() + more[0].tolist()])
    edits = explain_tokens(model, ids, prompt_columns=prompt, adapter_name=adapter_name)[0]
    tokens = [CONTINUES] * ids.shape[1]
    for shown, first, _ in readable(tokenizer, ids[0].tolist()):
        tokens[first] = shown
    return Explanation(tuple(tokens), tuple(edits), prompt)


def readable(tokenizer: Any, ids: list[int]) -> list[tuple[str, int, int]]:
    """Tokens as text, (text, first column, last column + 1): those that share a character, as in emoji, as one."""
    parts: list[tuple[str, int, int]] = []
    first = 0
    for column in range(len(ids)):
        shown = tokenizer.decode(ids[first : column + 1])
        if not shown.endswith("\ufffd") or column == len(ids) - 1:
            parts.append((shown.replace("\n", "\u23ce"), first, column + 1))
            first = column + 1
    return parts
