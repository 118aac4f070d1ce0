"""YAML of recipes and grids: no key twice, and what is no YAML or no UTF-8 is said in one line."""

from pathlib import Path
from typing import Any

import pytest

from reftune.bench.grid import load_grid
from reftune.train import RecipeError, load_recipe


@pytest.mark.parametrize("load", [load_recipe, load_grid])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"reft: {r: 1}\ntrain: {}\nreft: {r: 2}\n", "line 3: the key 'reft' is there a second time.*Write it once"),
        (b"train:\n  seed: 1\n  seed: 2\n", "line 3: the key 'seed'"),
        (b"train:\n\tseed: 1\n", r"is not YAML \(line 2, column 1\): found character"),
        (b"a: [", r"is not YAML \(line 1, column 5\)"),
        (b"# caf\xe9\n", "is not UTF-8 text: save it as UTF-8"),
        (b"a: \x00\n", "is not YAML: unacceptable character"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, load: Any, content: bytes, says: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=f"^{path}.*{says}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_key_that_a_merge_brings_can_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("reft: &own {r: 1, layers: all}\ntrain: {}\n")
    assert load_recipe(path).reft.r == 1
    path.write_text("suite: glue\nreft: &own {r: 1}\nper_task: {rte: {<<: *own, r: 2}}\ntasks: [rte]\n")
    assert load_grid(path).per_task == {"rte": {"r": 2}}
