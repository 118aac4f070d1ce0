"""`reftune bench`: what the verbs print and leave behind."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.bench.places import tiny_data, tiny_encoder
from typer.testing import CliRunner

from reftune.cli.app import app
from reftune.cli.bench import overrides
from reftune.interventions import INTERVENTIONS


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_a_grid_from_the_command_line_to_a_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    grid = tmp_path / "grid.yaml"
    methods = [{"method": "loreft", "lrs": [0.01]}, {"method": "probe", "lrs": [0.01]}]
    grid.write_text(json.dumps({"suite": "glue", "tasks": ["rte"], "methods": methods, "model": "nowhere"}))
    data, model = str(tiny_data(tmp_path / "data")), str(tiny_encoder(tmp_path / "encoder"))
    out = str(tmp_path / "out")
    options = ["--out", out, "--data", data, "--model", model, "--set", "train.steps=2", "--set", "seeds=[0, 1]"]
    planned = call("run", str(grid), *options, "--dry-run")
    assert "4 runs" in planned.stdout
    assert "0 to choose learning rates, 4 final" in planned.stdout
    assert not Path(out).exists()
    done = call("run", str(grid), *options)
    assert done.exit_code == 0, done.output
    assert "4 runs done here, 0 left" in done.stdout
    again = call("run", str(grid), *options, "--set", "seeds=[1, 2]", "--dry-run").stdout
    assert "4 runs" in again
    assert "final; 2 are done." in again
    assert sorted("-s1-" in line for line in again.splitlines() if line.endswith(" (done)")) == [True, True]
    shown = call("report", out)
    assert "| loreft | 66 |" in shown.stdout
    written = call("report", out, "--output", str(tmp_path / "docs"), "--title", "Tiny")
    assert written.exit_code == 0, written.output
    text = (tmp_path / "docs" / "report.md").read_text()
    assert text.startswith("# Tiny")
    assert "![glue-parameters](glue-parameters.png)" in text
    assert (tmp_path / "docs" / "glue-time.png").is_file()
    kept = (tmp_path / "docs" / "results.jsonl").read_text()
    assert len(kept.splitlines()) == 4
    assert "host" not in kept
    assert str(tmp_path / "data") not in kept

    # the rows of a report go on with another method, and reports of several places are one
    more = ["--out", str(tmp_path / "docs"), *options[2:], "--set", "methods=[{method: loreft, lrs: [0.01]}, full]"]
    gone_on = call("run", str(grid), *more)
    assert gone_on.exit_code == 0, gone_on.output
    assert "final; 2 are done." in gone_on.stdout
    assert "5 runs done here, 0 left" in gone_on.stdout
    together = call("report", out, str(tmp_path / "docs"))
    assert all(f"| {method} |" in together.stdout for method in ("loreft", "probe", "full"))
    assert "| loreft | 66 |" in together.stdout
    nowhere = call("run", str(grid), "--out", out, "--data", data)
    assert isinstance(nowhere.exception, OSError)  # said as an error of one line, before the first run
    assert "FAILED" not in nowhere.output
    unknown = "methods=[{method: lora, target_modules: [nothing], lrs: [0.01]}]"
    failed = call("run", str(grid), *options, "--set", unknown)
    assert failed.exit_code == 1
    assert "FAILED rte-lora" in failed.output


def test_a_kind_of_ones_own_is_a_method_once_its_module_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_kinds.py").write_text(
        "import reftune\n"
        '@reftune.register_intervention("my_noreft")\n'
        "class MyNoreft(reftune.NoreftIntervention): pass\n"
    )
    grid = {"suite": "glue", "tasks": ["rte"], "seeds": [0], "methods": [{"method": "my_noreft", "lrs": [0.01]}]}
    Path("grid.yaml").write_text(json.dumps(grid))
    data, model = str(tiny_data(tmp_path / "data")), str(tiny_encoder(tmp_path / "encoder"))
    command = ["run", "grid.yaml", "--out", "out", "--data", data, "--model", model, "--dry-run"]
    try:
        assert "my_noreft" in str(call(*command).exception)
        planned = CliRunner().invoke(app, ["--import", "my_kinds", "bench", *command])
        assert planned.exit_code == 0, planned.output
        assert "rte-my_noreft-s0-final" in planned.stdout
    finally:
        INTERVENTIONS.pop("my_noreft", None)
        sys.modules.pop("my_kinds", None)


def test_list_names_everything() -> None:
    shown = call("list").stdout
    for name in ("storycloze", "adalora", "postblock", "paper/glue-large", "alpaca_eval"):
        assert name in shown


def test_set_reads_yaml() -> None:
    assert overrides(["a.b=1", "c=[x, y]", "d=null", "e=1.5e-3"]) == {"a.b": 1, "c": ["x", "y"], "d": None, "e": 1.5e-3}
    with pytest.raises(ValueError, match="takes KEY=VALUE"):
        overrides(["a"])
    with pytest.raises(ValueError, match="is not YAML"):
        overrides(["a=[1"])
