"""A table in Markdown: `table(["method", "loss"], [["lora", "1.861"]])`."""

from collections.abc import Sequence


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The heads, a rule, and a row for each line; a `|` in a cell, as a name may have, does not divide it."""
    rule = ["---"] * len(heads)
    cells = ([cell.replace("|", "\\|") for cell in row] for row in (heads, rule, *lines))
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
