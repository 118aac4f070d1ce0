"""Grids over tiny models: rows, resuming, sharing, failing; the same numbers when repeated."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.bench.places import TRAIN, glue, silent, write_rows

from forked import Forked
from reftune.bench import jobs, load_grid, run_grid, runner
from reftune.bench.claims import Claims
from reftune.bench.grid import Job
from reftune.bench.progress import line, time_left, words
from reftune.bench.report import report
from reftune.bench.runner import best_lr
from reftune.bench.store import Store, read_rows


def scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {row["id"]: (row["metrics"], row["selection"], row["train_loss"], row["lr"]) for row in rows}


def test_a_grid_runs_resumes_and_repeats(places: dict[str, str], tmp_path: Path) -> None:
    grid, said = glue(places, tasks=["stsb"], seeds=[0]), []
    outcome = run_grid(grid, tmp_path / "one", data=places["data"], say=said.append)
    plan = jobs(grid)
    assert (outcome.finished, outcome.failed, outcome.left) == (len(plan), {}, 0)
    assert said[0].startswith("[1/4] stsb sweep loreft seed 0 lr 0.01: selection loss")
    assert "left" in said[0]
    assert "left" not in said[-1]
    lines = (tmp_path / "one" / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(plan)
    assert [json.loads(found)["id"] for found in lines] == [row["id"] for row in read_rows(tmp_path / "one")]

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / "one" / "claims" / f"{plan[0].id}.json"  # of a process killed just after its row was written
    left.write_text(json.dumps({**Claims(left.parent).owner, "pid": dead.pid}))
    again = run_grid(grid, tmp_path / "one", data=places["data"], say=said.append)
    assert again.finished == 0
    assert not left.exists()
    run_grid(grid, tmp_path / "two", data=places["data"], say=silent)
    assert scores(read_rows(tmp_path / "one")) == scores(read_rows(tmp_path / "two"))
    assert not list((tmp_path / "one" / "claims").glob("*.json"))


def test_a_row_holds_what_is_needed_to_repeat_it(places: dict[str, str], tmp_path: Path) -> None:
    grid = glue(places)
    run_grid(grid, tmp_path, data=places["data"], say=silent)
    rows = {(r["stage"], r["method"], r["seed"], r["lr"]): r for r in read_rows(tmp_path)}
    sweep = [r for key, r in rows.items() if key[0] == "sweep"]
    best = max(sweep, key=lambda r: (r["selection"]["score"], -r["selection"]["loss"]))["lr"]
    final = rows["final", "loreft", 1, best]
    assert [row["metrics"] for row in sweep] == [{}, {}]  # the choice never looks at the test
    assert final["trainable"] == 2 * (2 * 16 + 1)
    assert final["head"] == 16 * 16 + 16 + 16 * 2 + 2
    assert set(final["metrics"]["rte"]) == {"accuracy", "loss"}
    assert [s["lr"] for s in final["sweep"]] == [1e-2, 1e-1]
    assert final["lr_at_end"]
    assert final["steps"] == 3
    assert [row["steps"] for row in sweep] == [2, 2]
    assert final["rows"]["rte"] | {"digest": ""} == {"train": 24, "select": 8, "test": 8, "digest": ""}
    assert {"python", "reftune", "torch", "transformers", "peft", "tokenizers", "scikit-learn"} <= set(
        final["versions"]
    )
    assert final["data"] == places["data"]
    assert final["seconds"]["train"] > 0
    job = next(j for j in jobs(grid) if j.id == final["id"])
    assert final["spec"] == json.loads(json.dumps(job.spec()))
    assert best_lr(job, jobs(grid), Store(tmp_path))[0] == best
    same = [rows["final", "loreft", 1, best]["rows"], rows["final", "lora", 1, 1e-2]["rows"]]
    assert same[0] == same[1]


@pytest.mark.parametrize("by", ["loss", "score"])
def test_a_rate_that_broke_down_is_not_chosen(by: str, places: dict[str, str], tmp_path: Path) -> None:
    """The answers of a model of nan are all of one class, which may be the larger one."""
    methods = [{"method": "loreft", "lrs": [1e-3, 1e-2, 1e-1]}]
    plan, store = jobs(glue(places, methods=methods, seeds=[0], sweep={"by": by})), Store(tmp_path)
    reached = {1e-3: (0.5, 0.7), 1e-2: (0.5, 0.6), 1e-1: (0.6, float("nan"))}
    for job in plan[:3]:
        score, loss = reached[job.lr or 0]
        store.put({"id": job.id, "started": "", "lr": job.lr, "selection": {"score": score, "loss": loss}})
    assert best_lr(plan[3], plan, store)[0] == 1e-2


@pytest.mark.parametrize(
    ("suite", "tasks", "expected"),
    [
        (
            "commonsense",
            ["arc_easy", "boolq"],
            {"arc_easy": {"accuracy", "accuracy_ll", "loss"}, "boolq": {"accuracy", "accuracy_ll", "loss"}},
        ),
        ("arithmetic", ["addsub", "aqua"], {"addsub": {"accuracy", "loss"}, "aqua": {"accuracy", "loss"}}),
        (
            "instruct",
            ["alpaca", "ultrafeedback"],
            {"alpaca": {"loss"}, "ultrafeedback": {"preference", "margin", "margin_sum", "loss"}},
        ),
    ],
)
def test_text_suites_train_once_and_score_every_task(
    suite: str, tasks: list[str], expected: dict[str, set[str]], places: dict[str, str], tmp_path: Path
) -> None:
    methods = ["base", {"method": "loreft", "lrs": [1e-2]}]
    content = {"suite": suite, "tasks": tasks, "model": places["causal"], "methods": methods, "seeds": [0]}
    scoring = {"max_new_tokens": 4, "batch_size": 4}
    grid = load_grid(content | {"train": TRAIN, "rows": {"train": 8, "select": 4, "test": 4}, "scoring": scoring})
    run_grid(grid, tmp_path, data=places["data"], say=silent)
    base, loreft = read_rows(tmp_path)
    assert {name: set(found) for name, found in loreft["metrics"].items()} == expected
    assert (base["trainable"], base["steps"], base["lr"], base["train_loss"]) == (0, 0, None, None)
    assert loreft["steps"] == 3
    assert loreft["selection"]["loss"] < base["selection"]["loss"]
    assert all(0 <= v <= 1 for m in loreft["metrics"].values() for k, v in m.items() if k.startswith("acc"))


def test_a_cloze_compares_the_answers_own_words(places: dict[str, str], tmp_path: Path) -> None:
    content = {"suite": "commonsense", "tasks": ["arc_easy", "boolq"], "template": "cloze", "model": places["causal"]}
    grid = load_grid(content | {"methods": [{"method": "loreft", "lrs": [1e-2]}], "seeds": [0], "train": TRAIN})
    run_grid(grid, tmp_path, data=places["data"], say=silent)
    (row,) = read_rows(tmp_path)
    assert {name: set(found) for name, found in row["metrics"].items()} == {
        name: {"accuracy_norm", "accuracy_ll", "loss"} for name in ("arc_easy", "boolq")
    }
    assert "accuracy_norm" in report([row])


def test_glue_as_a_cloze_runs_on_a_language_model(places: dict[str, str], tmp_path: Path) -> None:
    methods = ["base", {"method": "loreft", "lrs": [1e-2, 2e-2]}, {"method": "lora", "r": 2, "lrs": [1e-2]}]
    content = {"suite": "glue", "tasks": ["rte"], "template": "cloze", "model": places["causal"], "seeds": [0]}
    grid = load_grid(content | {"methods": methods, "train": TRAIN, "sweep": {"by": "score"}})
    run_grid(grid, tmp_path, data=places["data"], say=silent)
    rows = read_rows(tmp_path)
    finals = {row["method"]: row for row in rows if row["stage"] == "final"}
    assert set(finals) == {"base", "loreft", "lora"}
    assert all(set(row["metrics"]["rte"]) == {"accuracy", "loss"} and row["head"] == 0 for row in finals.values())
    assert all(0 <= row["selection"]["score"] <= 1 for row in rows if row["stage"] == "sweep")
    assert finals["loreft"]["selection"]["loss"] < finals["base"]["selection"]["loss"]
    assert {row["rows"]["rte"]["test"] for row in rows} == {8}  # half of validation, as a classifier's


def test_the_halves_of_glue_move_with_the_seed_unless_they_are_fixed(places: dict[str, str], tmp_path: Path) -> None:
    methods = [{"method": "probe", "lrs": [1e-2]}]
    for name, rows, count in (("moving", {}, 2), ("fixed", {"split_seed": 0}, 1)):
        run_grid(glue(places, methods=methods, rows=rows), tmp_path / name, data=places["data"], say=silent)
        assert len({row["rows"]["rte"]["digest"] for row in read_rows(tmp_path / name)}) == count


def test_the_win_rate_comes_from_the_judge(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer:
        name = "longer"

        def prefers(self, instruction: str, a: str, b: str) -> float:
            return float(len(a) > len(b))

    monkeypatch.setattr("reftune.bench.causal.make_judge", lambda settings: Longer() if settings else None)
    tasks = {"tasks": ["alpaca", "alpaca_eval"], "train_tasks": ["alpaca"]}
    content = {"suite": "instruct", "model": places["causal"]} | tasks
    scoring = {"max_new_tokens": 4, "judge": {"url": "u", "model": "m", "key_env": None}}
    grid = load_grid(content | {"methods": ["base"], "seeds": [0], "scoring": scoring})
    run_grid(grid, tmp_path, data=places["data"], say=silent)
    (row,) = read_rows(tmp_path)
    assert 0 <= row["metrics"]["alpaca_eval"]["win_rate"] <= 1
    assert "loss" in row["metrics"]["alpaca_eval"]
    assert "win_rate" not in row["metrics"]["alpaca"]  # is not judged


def test_what_a_grid_lacks_is_said_before_the_first_run(places: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No data for sst2"):
        run_grid(glue(places, tasks=["rte", "sst2"]), tmp_path, data=places["data"])
    content = {"suite": "instruct", "tasks": ["alpaca_eval"], "train_tasks": ["alpaca"], "model": places["causal"]}
    judge = {"scoring": {"judge": {"url": "u", "model": "m", "key_env": "NO_SUCH_KEY"}}}
    with pytest.raises(ValueError, match=r"\$NO_SUCH_KEY"):
        run_grid(load_grid(content | judge), tmp_path, data=places["data"])
    alpaca = {"suite": "instruct", "tasks": ["alpaca"]}
    with pytest.raises(ValueError, match="holds a bert, an encoder"):
        run_grid(load_grid(alpaca | {"model": places["encoder"]}), tmp_path, data=places["data"])
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        run_grid(load_grid(alpaca | {"model": str(tmp_path)}), tmp_path, data=places["data"])
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        run_grid(glue(places | {"encoder": str(tmp_path)}), tmp_path, data=places["data"])
    write_rows(tmp_path / "glue" / "rte", train=[{"sentence1": "a"}])
    with pytest.raises(ValueError, match="row 1: sentence2 must be text"):
        run_grid(glue(places), tmp_path, data=str(tmp_path))
    assert not list((tmp_path / "rows").glob("*"))
    (tmp_path / "rows" / "damaged.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged\.json is damaged"):
        run_grid(glue(places), tmp_path, data=places["data"])


def test_selection_by_score_scores_the_selection_rows(places: dict[str, str], tmp_path: Path) -> None:
    content = {"suite": "commonsense", "tasks": ["boolq"], "model": places["causal"], "seeds": [0], "train": TRAIN}
    methods = [{"method": "loreft", "lrs": [1e-3, 1e-2]}]
    grid = load_grid(content | {"methods": methods, "sweep": {"by": "score"}, "scoring": {"max_new_tokens": 2}})
    run_grid(grid, tmp_path, data=places["data"], say=silent)
    assert all("score" in row["selection"] for row in read_rows(tmp_path) if row["stage"] == "sweep")


def test_a_failed_run_is_recorded_and_the_others_go_on(places: dict[str, str], tmp_path: Path) -> None:
    methods = [{"name": "bad", "method": "lora", "target_modules": ["nothing"], "lrs": [1e-3, 1e-2]}, "probe"]
    grid = glue(places, methods=methods)
    said: list[str] = []
    outcome = run_grid(grid, tmp_path, data=places["data"], say=said.append)
    assert len(outcome.failed) == 2  # the sweeps; its final runs cannot begin
    assert outcome.left == 4
    assert {row["method"] for row in read_rows(tmp_path)} == {"probe"}
    assert any(text.startswith("FAILED rte-bad") for text in said)
    assert "modules_to_save" in next((tmp_path / "failures").iterdir()).read_text()


def test_no_run_begins_after_the_time_is_up(places: dict[str, str], tmp_path: Path) -> None:
    outcome = run_grid(glue(places), tmp_path, data=places["data"], minutes=0, say=silent)
    assert (outcome.finished, outcome.left) == (0, len(jobs(glue(places))))


def share(content: dict[str, Any], out: Path, data: str) -> None:
    """Run in a process of its own: work on a grid, and note which runs were begun."""
    run = runner.run_job

    def noted(job: Job, **more: Any) -> dict[str, Any]:
        with (out / "begun.txt").open("a") as file:
            file.write(f"{os.getpid()} {job.id}\n")
        return run(job, **more)

    runner.run_job = noted
    outcome = run_grid(load_grid(content), out, data=data)
    print("finished", outcome.finished, outcome.left, flush=True)


def plain(places: dict[str, str], steps: int) -> dict[str, Any]:
    methods = [{"method": "loreft", "lrs": [1e-2, 1e-1]}, {"method": "probe", "lrs": [1e-2]}]
    content: dict[str, Any] = {"suite": "glue", "tasks": ["rte"], "model": places["encoder"], "methods": methods}
    return content | {"seeds": [0, 1, 2], "train": {"steps": steps, "batch_size": 4}}


@pytest.mark.slow
def test_processes_share_a_grid_and_do_a_killed_ones_run(places: dict[str, str], tmp_path: Path) -> None:
    content = plain(places, steps=40)
    plan = jobs(load_grid(content))
    workers = [Forked(share, content, tmp_path, places["data"], log=tmp_path / f"{n}.log") for n in range(2)]
    deadline = time.time() + 120
    while not list((tmp_path / "rows").glob("*.json")) and time.time() < deadline:
        time.sleep(0.05)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rows").glob("*.json")}
    workers[0].kill()
    workers[0].wait()
    assert workers[1].wait(120) == 0, workers[1].said()
    said = workers[1].said()
    rows = read_rows(tmp_path)
    assert sorted(row["id"] for row in rows) == sorted(job.id for job in plan)
    assert len({row["id"] for row in rows}) == len(rows)
    begun = [line.split(" ", 1) for line in (tmp_path / "begun.txt").read_text().splitlines()]
    again = {name for pid, name in begun if pid == str(workers[0].pid)} - {Path(name).stem for name in kept}
    for job in plan:  # once each, but for what the killed process had begun
        times = sum(name == job.id for _, name in begun)
        assert times == 1 or (times == 2 and job.id in again), job.id
    assert not list((tmp_path / "claims").glob("*.json"))
    finished = int(said.rsplit("finished", 1)[1].split()[0])
    assert 1 <= finished <= len(plan)
    assert said.rsplit("finished", 1)[1].split()[1] == "0"
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "rows").glob("*.json")}.items()


def test_what_fails_after_training_does_not_lose_the_training(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import reftune.bench.classify as classify

    grid = glue(places, methods=[{"method": "loreft", "lrs": [1e-2]}], seeds=[0], train=TRAIN | {"checkpoint_steps": 2})
    measure = classify.evaluate
    monkeypatch.setattr(classify, "evaluate", lambda *a, **k: 1 / 0)
    assert run_grid(grid, tmp_path, data=places["data"], say=silent).failed
    monkeypatch.setattr(classify, "evaluate", measure)
    assert run_grid(grid, tmp_path, data=places["data"], say=silent).finished == 1
    (row,) = read_rows(tmp_path)
    assert row["resumed"]
    assert row["steps"] == 3
    assert not list((tmp_path / "work").glob("*"))


def test_what_the_frozen_base_makes_the_same_is_computed_once(places: dict[str, str], tmp_path: Path) -> None:
    methods = [{"method": "loreft", "positions": "l2", "lrs": [1e-2, 3e-2]}, {"method": "red", "lrs": [1e-2]}]
    content = {"suite": "arithmetic", "tasks": ["addsub"], "model": places["causal"], "methods": methods, "seeds": [0]}
    sizes = {"train": {"steps": 8, "batch_size": 4}, "sweep": {"steps": 4}, "scoring": {"max_new_tokens": 2}}
    grid = load_grid(content | sizes | {"rows": {"train": 16, "select": 4, "test": 4}})
    for how in ("auto", "off"):
        run_grid(grid, tmp_path / how, data=places["data"], say=silent, reuse=how)
    reused, plain = ({row["id"]: row for row in read_rows(tmp_path / how)} for how in ("auto", "off"))
    for job in jobs(grid):
        a, b = reused[job.id], plain[job.id]
        assert bool(a["reuse"]) == (job.method.name == "loreft")  # RED edits within the first block
        assert b["reuse"] is None
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-6)
        assert a["selection"]["loss"] == pytest.approx(b["selection"]["loss"], rel=1e-6)


def test_reuse_is_auto_or_off(places: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'"auto" or "off", but is \'disk\''):
        run_grid(glue(places), tmp_path, data=places["data"], reuse="disk")  # type: ignore[arg-type]


def test_time_left_goes_by_the_likes_of_what_is_missing(places: dict[str, str]) -> None:
    plan = jobs(glue(places))
    assert time_left(plan, [], 1) is None
    first = plan[0]
    row = {"id": first.id, "stage": "sweep", "task": "rte", "method": "loreft", "seconds": {"all": 10.0}}
    assert time_left(plan, [row], 1) == 10.0 * (len(plan) - 1)
    final = {"id": plan[-1].id, "stage": "final", "task": "rte", "method": "lora", "seconds": {"all": 100.0}}
    assert time_left(plan, [row, final], 2) == (10 + 100 * 3) / 2
    assert [words(s) for s in (42, 720, 12240)] == ["42 s", "12 min", "3.4 h"]
    shown = row | {"suite": "glue", "metrics": {"rte": {"accuracy": 0.5}}, "selection": {}, "seed": 1, "lr": 1e-3}
    assert line(shown, 1, 2, 60.0) == "[1/2] rte sweep loreft seed 1 lr 0.001: rte 50.0, 10 s; about 60 s left"
