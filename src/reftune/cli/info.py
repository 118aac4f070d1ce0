"""`reftune info DIR`: what an adapter is, as a table. Reads two small files; the base model is not needed."""

import re
from typing import TYPE_CHECKING

from reftune.checkpoint.card import formula, positions_in_words
from reftune.checkpoint.info import AdapterInfo, describe

if TYPE_CHECKING:
    from rich.console import Console


def info(adapter: str, console: "Console | None" = None) -> AdapterInfo:
    """Print what the adapter in the directory `adapter` is; also returns it. Errors are those of `describe`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = describe(adapter)
    console = console or Console()
    summary = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    summary.add_column(style="bold")
    summary.add_column()
    for name, text in _summary(found):
        summary.add_row(name, Text(text))
    console.print(summary)
    sites = Table(title="Interventions", title_justify="left")
    for heading in ("edits", "positions", "kind"):
        sites.add_column(heading, overflow="fold")
    for heading in ("rank", "parameters", "max |RRᵀ − I|"):
        sites.add_column(heading, justify="right", no_wrap=True)
    for site in found.sites:
        rank = "" if site.rank is None else str(site.rank)
        row = (site.name, site.positions, site.kind, rank, f"{site.parameters:,}", _error(site.orthonormality_error))
        sites.add_row(*map(Text, row))
    console.print(sites)
    return found


def print_cost(adapter: str, prompt: int, new: int) -> None:
    """Print what the adapter adds to the work of its base; needs the base's config, not its weights."""
    from peft import PeftConfig, get_peft_model

    from reftune.models import load_shape
    from reftune.operations import cost

    config = PeftConfig.from_pretrained(adapter)
    if not config.base_model_name_or_path:
        raise ValueError(f"The adapter in {adapter} does not name its base model, so its work cannot be counted.")
    print(cost(get_peft_model(load_shape(config.base_model_name_or_path), config), prompt, new))


def _summary(found: AdapterInfo) -> list[tuple[str, str]]:
    shape = found.base_model_shape
    base = found.base_model or "not named"
    if shape:
        base += f" ({', '.join(f'{key} {value}' for key, value in shape.items())})"
    depth = f" of {shape['num_hidden_layers']}" if found.layers and "num_hidden_layers" in shape else ""
    expressions = found.positions.split(", ")
    rows = [
        ("Adapter", found.directory),
        ("Base model", base),
        ("Task", found.task_type or "not named"),
        ("Kind", "; ".join(f"{name}: {text}" for name, text in map(formula, re.split(", | or ", found.kind)))),
        ("Positions", "; ".join(f"{text}: {positions_in_words(text)}" for text in expressions)),
        ("Layers", (found.layers or "none with a number") + depth),
        ("Rank", found.rank or "none"),
        ("Size", f"{found.parameters:,} parameters in {found.dtype}, {found.nbytes / 1000:,.1f} kB on disk"),
        ("Orthonormal", _overall(found.orthonormality_error)),
    ]
    if found.lora_parameters:
        rows.insert(-1, ("LoRA part", f"{found.lora_parameters:,} parameters"))
    if found.other_parameters:
        rows.insert(-1, ("Modules saved whole", f"{found.other_parameters:,} parameters"))
    return rows


def _overall(error: float | None) -> str:
    return "this kind has no orthonormal rows" if error is None else f"max |RRᵀ − I| = {error:.1e}"


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"
