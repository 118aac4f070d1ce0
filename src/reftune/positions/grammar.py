"""The language of positions: "f2+l2" → terms.

    f2      the first 2 tokens of the prompt        l2      the last 2 tokens of the prompt
    mid1    1 token at prompt_length // 2           prompt  every token of the prompt
    all     every token, prompt and generated       gen     every generated token
    gen:32  the first 32 generated tokens           gen/64  every 64th generated token (the 64th, 128th, ...)

Terms are joined by "+"; the order is the order in which overlapping edits are applied.
"""

import functools
import re
from dataclasses import dataclass
from typing import Literal

Name = Literal["f", "l", "mid", "prompt", "all", "gen", "gen:", "gen/"]

_COUNTED = re.compile(r"(f|l|mid|gen:|gen/)(\d+)")
_MOST = 2**31 - 1
_PLAIN = ("prompt", "all", "gen")
_HELP = "Terms are f2, l2, mid1, prompt, all, gen, gen:32 and gen/64 (with numbers of your own), joined by '+'."


@dataclass(frozen=True)
class Term:
    """One term of an expression: its name and its number (0 where it has none)."""

    name: Name
    number: int = 0

    def __str__(self) -> str:
        return f"{self.name}{self.number}" if self.number else self.name

    @property
    def in_prompt(self) -> bool:
        """Whether every token it names is a prompt token: nothing of it is left once the prompt has been read."""
        return self.name in ("f", "l", "mid", "prompt")

    @property
    def counts_answer(self) -> bool:
        """Whether it matters which token of an answer a token is."""
        return self.name in ("gen:", "gen/")


def parse(expression: str) -> tuple[Term, ...]:
    """The terms of an expression in its order; anything else is a ValueError that says what was found."""
    if not isinstance(expression, str) or not expression.strip():
        raise ValueError(f"positions must be an expression such as 'f2+l2', but is {expression!r}. {_HELP}")
    terms: list[Term] = []
    for part in expression.replace(" ", "").split("+"):
        counted = _COUNTED.fullmatch(part)
        if counted:
            term = Term(counted[1], int(counted[2]))  # type: ignore[arg-type]
            if term.number == 0:
                raise ValueError(f"'{part}' in positions={expression!r} names no token: the number must be at least 1.")
            if term.number > _MOST:
                raise ValueError(f"'{part}' in positions={expression!r} is too long: the number is at most {_MOST}.")
        elif part in _PLAIN:
            term = Term(part)  # type: ignore[arg-type]
        else:
            raise ValueError(f"'{part}' in positions={expression!r} is no position. {_HELP}")
        if any(term.name == other.name for other in terms):
            raise ValueError(f"positions={expression!r} has two terms '{term.name}': join them into one.")
        terms.append(term)
    return tuple(terms)


@functools.cache
def groups(expression: str, share_weights: bool) -> tuple[str, ...]:
    """The expressions that have an intervention each: one a term, or the whole expression when weights are shared."""
    terms = parse(expression)
    if share_weights:
        return ("+".join(map(str, terms)),)
    return tuple(map(str, terms))
