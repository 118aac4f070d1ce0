"""Positions once more in slow, plain Python: one token at a time, one row at a time."""

import re
from dataclasses import dataclass


@dataclass
class Token:
    """Place in the prompt or the answer (−1 if in neither), and the number of prompt tokens of its sequence."""

    index: int = -1
    generated: int = -1
    length: int = 0


def places(real: list[bool], response: list[bool] | None, starts: list[bool] | None) -> list[Token]:
    """The tokens of one row."""
    tokens = [Token() for _ in real]
    sequences: list[list[int]] = [[]]
    for column in range(len(real)):
        if starts is not None and starts[column]:
            sequences.append([])
        sequences[-1].append(column)
    for columns in sequences:
        columns = [c for c in columns if real[c]]
        answer_begins = next((k for k, c in enumerate(columns) if response is not None and response[c]), len(columns))
        for k, column in enumerate(columns):
            tokens[column].length = answer_begins
            if k < answer_begins:
                tokens[column].index = k
            else:
                tokens[column].generated = k - answer_begins
    return tokens


def chosen(tokens: list[Token], term: str, expression: str) -> list[bool]:
    """Which tokens of a row one term of an expression names."""
    first = sum(int(n) for n in re.findall(r"(?:^|\+)f(\d+)", expression))
    last = sum(int(n) for n in re.findall(r"(?:^|\+)l(\d+)", expression))
    number = int((re.findall(r"\d+", term) or ["0"])[0])
    out = []
    for token in tokens:
        n, i, g = token.length, token.index, token.generated
        p, s = (min(first, n // 2), min(last, -(-n // 2))) if n < first + last else (first, last)
        start = max(n // 2 - number // 2, 0)
        out.append(
            {
                "f": i in range(n)[:p],
                "l": i in range(n)[max(n - s, 0) :],
                "mid": i in range(n)[start : start + number],
                "prompt": i >= 0,
                "all": i >= 0 or g >= 0,
                "gen": g >= 0,
                "gen:": 0 <= g < number,
                "gen/": g >= 0 and number > 0 and (g + 1) % number == 0,
            }[term.rstrip("0123456789")]
        )
    return out
