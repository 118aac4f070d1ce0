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
        return lambda row: _from_messages(row[has["messages"]])
    if "prompt" in has and "completion" in has:
        return lambda row: _from_prompt(row[has["prompt"]], row[has["completion"]])
    if "instruction" in has and "output" in has:
        return lambda row: _from_instruction(
            row[has["instruction"]], row[has["input"]] if "input" in has else None, row[has["output"]]
        )
    raise ValueError(
        f"The data has the columns {_listed(names)}, and none of the layouts that reftune knows: {ACCEPTED}. "
        "Rename the columns, or name them in the recipe: data.columns: {prompt: question, completion: answer}."
    )


def _from_messages(messages: Any) -> Example:
    turns = _messages(messages)
    if not turns or turns[-1]["role"] != "assistant":
        last = turns[-1]["role"] if turns else "nothing"
        raise ValueError(f"The last of the messages must be the assistant's, which is learned, but it is {last}'s.")
    if len(turns) < 2:
        raise ValueError("The messages hold an answer and nothing before it: a prompt is needed.")
    return Example(turns[:-1], turns[-1]["content"])


def _from_prompt(prompt: Any, completion: Any) -> Example:
    messages = [_user(_text(prompt, "prompt"))] if isinstance(prompt, str) else _messages(prompt)
    if isinstance(completion, str):
        return Example(messages, completion)
    return _from_messages([*messages, *_messages(completion)])


def _from_instruction(instruction: Any, extra: Any, output: Any) -> Example:
    text = _text(instruction, "instruction")
    if extra:
        text += "\n" + _text(extra, "input")
    return Example([_user(text)], _text(output, "output"))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError(f"Messages are a list of {{role, content}}, but found {_short(value)}.")
    for turn in value:
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise ValueError(f"A message has a role and a content, both text, but found {_short(dict(turn))}.")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"The column {column} must hold text, but found {_short(value)}.")
    return value


def _short(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) < 80 else shown[:77] + '...'}"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "no columns"
