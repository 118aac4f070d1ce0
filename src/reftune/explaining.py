"""See it: `print(reftune.explain(model, tokenizer, "text"))` shows which tokens an adapter edits, and at which layers."""

from dataclasses import dataclass
from typing import Any

from .tuner.explain import Edit, explain_tokens


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
        """The edits of one token in short, such as "f2 · layers 10, 15"."""
        layers: dict[str, list[str]] = {}
        for edit in self.at(column):
            layers.setdefault(edit.group, []).append(edit.site if edit.layer is None else str(edit.layer))
        return ", ".join(
            f"{group} · layer{'s' if len(found) > 1 else ''} {_ranges(found)}" for group, found in layers.items()
        )

    def __str__(self) -> str:
        width = max((len(token) for token in self.tokens), default=0)
        lines = []
        for column, token in enumerate(self.tokens):
            what = "prompt" if column < self.prompt else "answer"
            mark = "*" if self.at(column) else " "
            lines.append(f"{mark} {column:4d}  {what}  {token:<{width}}  {self.where(column)}".rstrip())
        return "\n".join(lines)


def explain(
    model: Any,
    tokenizer: Any,
    text: str | list[dict[str, str]],
    answer: str = "",
    adapter_name: str | None = None,
    chat_template: bool | None = None,
) -> Explanation:
    """What the adapter edits in a prompt (and in an answer to it).

    Args:
        model: a PeftModel with a ReFT adapter.
        tokenizer: its tokenizer; the chat template is used where it has one, unless `chat_template=False`.
        text: a prompt, or chat messages.
        answer: tokens that the model has generated, to see what `gen` and `all` edit.
    """
    if chat_template is None:
        chat_template = getattr(tokenizer, "chat_template", None) is not None
    if chat_template or not isinstance(text, str):
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
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
    tokens = tuple(tokenizer.decode([token]).replace("\n", "⏎") for token in ids[0].tolist())
    return Explanation(tokens, tuple(edits), prompt)


def _ranges(numbers: list[str]) -> str:
    """["0", "1", "2", "5"] → "0-2, 5"."""
    if not all(n.isdigit() for n in numbers):
        return ", ".join(numbers)
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
