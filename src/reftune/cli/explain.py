"""`reftune explain --adapter DIR "text"`: the tokens of a prompt, the edited ones marked, the layers beside them."""

from typing import Any

from reftune.explaining import CONTINUES, Explanation, explain


def print_explanation(model: Any, tokenizer: Any, text: str, answer: str = "") -> Explanation:
    """Print the explanation of a prompt: the text with the edited tokens highlighted, and a table; also returns it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = explain(model, tokenizer, text, answer)
    console = Console()
    line = Text()
    for column, token in enumerate(found.tokens):
        style = "bold green reverse" if found.at(column) else "" if column < found.prompt else "italic"
        line.append("" if token == CONTINUES else token.replace("⏎", "⏎\n"), style=style)
    console.print(line)
    table = Table("", "token", "part", "edited by")
    for column, token in enumerate(found.tokens):
        edited = found.where(column)
        part = "prompt" if column < found.prompt else "answer"
        shown = Text(repr(token)[1:-1], style="bold green" if edited else "dim")
        table.add_row(str(column), shown, part, Text(edited))
    console.print(table)
    count = sum(bool(found.at(column)) for column in range(len(found.tokens)))
    console.print(f"{count} of {len(found.tokens)} tokens are edited ({found.prompt} of them are the prompt).")
    return found
