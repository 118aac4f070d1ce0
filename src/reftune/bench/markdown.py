"""A table in Markdown: `table(["method", "loss"], [["lora", "1.861"]])`."""

from collections.abc import Sequence


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The heads, a rule, and a row for each line."""
    rule = ["---"] * len(heads)
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *lines))
