"""`reftune demo`: ten examples, a rank-4 adapter, and unseen prompts answered before and after.

    demo("runs/emoji")

The recipe is `emoji.yaml` (in the package and, to be read and changed, in `recipes/`), the examples `reftune:emoji`.
"""

import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

UNSEEN = (
    "What is your favourite animal?",
    "How do I cook rice?",
    "It is my birthday!",
    "Tell me about the ocean.",
    "I have a headache.",
    "What is a good book?",
    "How do airplanes fly?",
    "Where do you live?",
)

_JOINERS = (0xFE0F, 0x200D, 0x20E3)
_RANGES = (
    (0x2190, 0x21FF), (0x2300, 0x23FF), (0x25A0, 0x27BF), (0x2900, 0x297F), (0x2B00, 0x2BFF), (0x1F000, 0x1FAFF),
)  # fmt: skip


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed: (prompt, answer before, answer after) each, and how many answers are in emoji."""

    answers: list[tuple[str, str, str]]
    before: int
    after: int
    output_dir: Path
    seconds: float


def demo(output_dir: str = "runs/emoji", *, model: str | None = None, seed: int | None = None) -> DemoResult:
    """Train the emoji adapter and show what it does to prompts it has not seen."""
    from rich.table import Table
    from rich.text import Text

    from reftune.cli.talk import Talker, answer
    from reftune.data import PromptTemplate
    from reftune.models import load_model
    from reftune.train import load_recipe, train
    from reftune.train.resuming import start_of
    from reftune.train.run import last_line, printer

    start = time.perf_counter()
    say = printer()
    overrides: dict[str, Any] = {"train.output_dir": output_dir}
    overrides |= {"model.name": model} if model else {}
    overrides |= {"train.seed": seed} if seed is not None else {}
    with resources.as_file(resources.files("reftune.data") / "emoji.yaml") as path:
        recipe = load_recipe(path, overrides)
    recipe.train.overwrite = _made_before(output_dir, recipe.data.train)
    start_of(recipe, say)  # it refuses to replace any other adapter, before the slow steps

    say(f"Loading {recipe.model.name} (unpacking its file takes half a minute, once) ...")
    base, tokenizer = load_model(recipe.model.name, dtype=recipe.model.dtype)
    base_talker = Talker(base, tokenizer, PromptTemplate(tokenizer, recipe.data.template, recipe.data.system))
    say(f"Answers to {len(UNSEEN)} prompts before training ...")
    before = answer(base_talker, UNSEEN, max_new_tokens=32)

    result = train(recipe, loaded=(base, tokenizer), say=say)
    after = answer(Talker(result.model, tokenizer, result.template), UNSEEN, max_new_tokens=32)

    table = Table(title="Prompts that were not trained on", show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name)
    for prompt, old, new in zip(UNSEEN, before, after, strict=True):
        table.add_row(*(Text(_short(text)) for text in (prompt, old.text, new.text)))
    say(table)
    counts = [sum(said.ended and is_emoji_answer(said.text) for said in answers) for answers in (before, after)]
    seconds = time.perf_counter() - start
    say(f"In emoji: {counts[0]} of {len(UNSEEN)} before, {counts[1]} of {len(UNSEEN)} after. {seconds:.0f} s.")
    say(last_line(result))
    answers = [(prompt, old.text, new.text) for prompt, old, new in zip(UNSEEN, before, after, strict=True)]
    return DemoResult(answers, counts[0], counts[1], result.output_dir, seconds)


def _made_before(output_dir: str, examples: str | None) -> bool:
    """Whether what lies there was trained on the demo's own examples, so that nothing of anybody's is replaced."""
    from reftune.train import RecipeError, load_recipe

    try:
        return load_recipe(Path(output_dir) / "recipe.yaml").data.train == examples
    except RecipeError:
        return False


def is_emoji_answer(text: str) -> bool:
    """Whether most characters of a text, spaces apart, are emoji."""
    characters = [c for c in text if not c.isspace()]
    return sum(map(_is_emoji, characters)) > len(characters) / 2


def _is_emoji(character: str) -> bool:
    code = ord(character)
    return code in _JOINERS or any(low <= code <= high for low, high in _RANGES)


def _short(text: str, length: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
