"""What a row of a data folder must hold, so that a wrong one is said before the first run and not in it.

Fields(texts=("question",), choices=True, index="answer").wrong(row)     # None, or "answer must be ..., but is 7"
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fields:
    """The fields of a task's rows.

    texts: those with a text; maybe: those with a text or null, which may also not be there. choices: `choices` is a
    list of texts. number: the one with a number. index: the one with a whole number from 0 that is below `classes`
    and points at one of the choices.
    """

    texts: tuple[str, ...] = ()
    maybe: tuple[str, ...] = ()
    choices: bool = False
    number: str | None = None
    index: str | None = None
    classes: int | None = None

    def wrong(self, row: Any) -> str | None:
        """What is wrong with a row, None if nothing is."""
        if not isinstance(row, Mapping):
            return f"must be an object of fields, but is {row!r:.60}"
        for name in (*self.texts, *self.maybe):
            if not isinstance(row.get(name), str) and not (name in self.maybe and row.get(name) is None):
                return _must(row, name, "text")
        if self.choices and not _texts(row.get("choices")):
            return _must(row, "choices", "a list of texts")
        if self.number is not None and not _is_number(row.get(self.number)):
            return _must(row, self.number, "a number")
        counts = ([self.classes] if self.classes else []) + ([len(row["choices"])] if self.choices else [])
        if self.index is not None and not _is_index(row.get(self.index), min(counts)):
            return _must(row, self.index, f"a whole number from 0 to {min(counts) - 1}")
        return None


ANYTHING = Fields()


def _must(row: Mapping[str, Any], name: str, what: str) -> str:
    return f"{name} must be {what}, but is {repr(row[name])[:60] if name in row else 'not there'}"


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_index(value: Any, count: int) -> bool:
    return _is_number(value) and float(value) in range(count) and not (isinstance(value, str) and "." in value)
