"""Find which columns hold the prompt and the response, and turn a row into an `Example`.

    read_row = find_columns(["instruction", "input", "output"])
    read_row({"instruction": "Add.", "input": "1 2", "output": "3"})   # Example(messages=[...], response="3")

Three layouts, looked for in this order: `messages` (a chat; the last turn, the assistant's, is the response), `prompt`
+ `completion` (each a text, or a list of messages), `instruction` (+ `input`) + `output`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

# what chat templates write beside the content, and would be lost
_BESIDE = ("tool_calls", "function_call", "reasoning_content", "thinking")

ACCEPTED = "messages; prompt + completion; instruction (+ input) + output"


@dataclass(frozen=True)
class Example:
    """What the model is given, as chat messages, and what it shall answer."""

    messages: list[Message]
    response: str


def find_columns(
    names: Iterable[str], rename: Mapping[str, str] | None = None
) -> Callable[[Mapping[str, Any]], Example]:
    """A function from a row to an `Example`; a `ValueError` if no known layout is among the columns.

    Args:
        names: the columns of the data.
        rename: from a name reftune knows to the data's own, e.g. `{"prompt": "question", "completion": "answer"}`.
    """
    names = list(names)
    rename = dict(rename or {})
    for ours, theirs in rename.items():
        if theirs not in names:
            raise ValueError(f"columns says that {ours} is {theirs!r}, but the data has {_listed(names)}.")
        if ours not in ("messages", "prompt", "completion", "instruction", "input", "output"):
            raise ValueError(f"columns can rename to {ACCEPTED}, not to {ours!r}.")
    has = {name: name for name in names if name not in rename.values()} | rename
    if "messages" in has:
        return lambda row: _from_messages(_messages(row, has["messages"]))
    if "prompt" in has and "completion" in has:
        return lambda row: _from_prompt(row, has["prompt"], has["completion"])
    if "instruction" in has and "output" in has:
        return lambda row: _from_instruction(row, has["instruction"], has.get("input"), has["output"])
    raise ValueError(
        f"The data has the columns {_listed(names)}, and none of the layouts that reftune knows: {ACCEPTED}. "
        "Rename the columns, or name them in the recipe: data.columns: {prompt: question, completion: answer}."
    )


def _from_messages(turns: list[Message]) -> Example:
    if (last := turns[-1]["role"]) != "assistant":
        raise ValueError(f"The last of the messages must be the assistant's, which is learned, but it is {last}'s.")
    if len(turns) < 2:
        raise ValueError("The messages hold an answer and nothing before it: a prompt is needed.")
    return Example(turns[:-1], turns[-1]["content"])


def _from_prompt(row: Mapping[str, Any], prompt: str, completion: str) -> Example:
    messages = [_user(row[prompt])] if isinstance(row[prompt], str) else _messages(row, prompt, "text or messages")
    if isinstance(row[completion], str):
        return Example(messages, row[completion])
    return _from_messages([*messages, *_messages(row, completion, "text or messages")])


def _from_instruction(row: Mapping[str, Any], instruction: str, extra: str | None, output: str) -> Example:
    text = _text(row, instruction)
    if extra is not None and row[extra]:
        text += "\n" + _text(row, extra)
    return Example([_user(text)], _text(row, output))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _messages(row: Mapping[str, Any], column: str, wanted: str = "messages") -> list[Message]:
    value = row[column]
    if not value or not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise _wrong(row, column, f"{wanted} (a list of {{role, content}})")
    for turn in value:
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise ValueError(f"A message has a role and a content, both text, but found {_short(dict(turn))}.")
        if lost := [name for name in _BESIDE if turn.get(name)]:
            raise ValueError(
                f"A message has {' and '.join(lost)} beside its content, which would be lost: write it into the "
                "content as the model shall read or write it, or leave it out."
            )
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise _wrong(row, column, "text")
    return value


def _wrong(row: Mapping[str, Any], column: str, wanted: str) -> ValueError:
    if row[column] is None:  # also where a row lacks a column that others have
        return ValueError(f"The column {column} must hold {wanted}, but is empty: fill it in, or leave the row out.")
    return ValueError(f"The column {column} must hold {wanted}, but found {_short(row[column])}.")


def _short(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) < 80 else shown[:77] + '...'}"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "no columns"
