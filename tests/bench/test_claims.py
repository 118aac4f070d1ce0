"""Claims between processes: one owner at a time, and a dead or silent owner's claim is taken over."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reftune.bench import claims
from reftune.bench.claims import Claims

# the module alone, for importing the package takes longer than the test
HOLD = """
import runpy, sys, time
from pathlib import Path
Claims = runpy.run_path(sys.argv[2])["Claims"]
with Claims(Path(sys.argv[1])).take("run") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def holder(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), claims.__file__], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "True"
    return process


def test_a_run_has_one_owner_and_a_killed_ones_claim_is_taken_over(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        claims = Claims(tmp_path)
        with claims.take("run") as mine:
            assert not mine
        with claims.take("other") as mine:
            assert mine
            assert claims.live() == ["other", "run"]
        assert claims.live() == ["run"]
    finally:
        process.kill()
        process.communicate()
    assert claims.live() == []
    with claims.take("run") as mine:
        assert mine
    assert list(tmp_path.glob("*.json")) == []


def claim_of(path: Path, host: str, age: float) -> None:
    path.write_text(json.dumps({"host": host, "pid": 1, "token": "t"}))
    then = time.time() - age
    os.utime(path, (then, then))


def test_another_machines_claim_counts_while_it_is_touched(tmp_path: Path) -> None:
    claims = Claims(tmp_path, stale=100)
    claim_of(tmp_path / "run.json", "elsewhere", age=5)
    with claims.take("run") as mine:
        assert not mine
    claim_of(tmp_path / "run.json", "elsewhere", age=101)
    with claims.take("run") as mine:
        assert mine
    (tmp_path / "run.json").write_text("{torn")
    with claims.take("run") as mine:
        assert mine


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_a_machines_own_clock_does_not_tell_a_claims_age(
    ahead: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a folder that machines share, the times of files are the server's, and clocks differ."""
    claims, now = Claims(tmp_path, stale=100), time.time
    claim_of(tmp_path / "held.json", "elsewhere", age=5)
    claim_of(tmp_path / "dropped.json", "elsewhere", age=101)
    monkeypatch.setattr(time, "time", lambda: now() + ahead)
    assert claims.live() == ["held"]
    for name, free in (("held", False), ("dropped", True)):
        with claims.take(name) as mine:
            assert mine == free
    claims.tidy()
    assert [path.name for path in tmp_path.glob("*.json")] == ["held.json"]


def test_a_claim_is_touched_while_its_run_lasts_and_given_back_only_by_its_owner(tmp_path: Path) -> None:
    claims = Claims(tmp_path, beat=0.05)
    path = tmp_path / "run.json"
    with claims.take("run") as mine:
        assert mine
        os.utime(path, (1, 1))
        deadline = time.time() + 10
        while path.stat().st_mtime < 2 and time.time() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 2
        claim_of(path, "elsewhere", age=0)  # taken over while this process was stopped
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_what_the_dead_left_is_tidied_away_and_what_the_living_hold_is_not(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name, pid in (("done", dead.pid), ("held", os.getpid())):
        (tmp_path / f"{name}.json").write_text(json.dumps({**claims.owner, "pid": pid, "token": "x"}))
    claims.tidy()
    assert [path.stem for path in tmp_path.glob("*.json")] == ["held"]
