"""Rows of results: written once, gone on from, published without names of places."""

import json
from pathlib import Path

import pytest

from reftune.bench.grid import jobs, load_grid
from reftune.bench.store import Store, done, publish, read_rows


def test_a_row_is_written_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    row = {"id": "a", "started": "2", "x": float("nan")}
    assert store.put(row)
    assert not store.put(row | {"x": 1})
    assert store.put({"id": "b", "started": "1"})
    assert [found["id"] for found in store.rows()] == ["b", "a"]
    assert store.get("a")["x"] is None
    assert read_rows(tmp_path / "results.jsonl") == store.rows()
    with pytest.raises(FileNotFoundError, match="No results in"):
        read_rows(tmp_path / "nowhere")
    Store(tmp_path / "empty")
    with pytest.raises(ValueError, match="no results yet"):
        read_rows(tmp_path / "empty")


def test_a_directory_goes_on_from_a_results_file_alone(tmp_path: Path) -> None:
    rows = [{"id": name, "started": name} for name in "ab"]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert done(tmp_path) == {"a", "b"}
    store = Store(tmp_path)
    assert store.rows() == rows
    assert not store.put(rows[0])
    assert store.put({"id": "c", "started": "c"})
    assert [row["id"] for row in read_rows(tmp_path / "results.jsonl")] == ["a", "b", "c"]
    (tmp_path / "rows" / "a.json").unlink()  # a row that was removed stays so
    assert [row["id"] for row in Store(tmp_path).rows()] == ["b", "c"]
    assert not list(tmp_path.glob(".rows*"))
    assert done(tmp_path) == {"b", "c"}
    assert done(tmp_path / "nowhere") == set()
    assert not (tmp_path / "nowhere").exists()


def test_a_sweeps_run_that_was_named_by_all_its_rates_is_still_done(tmp_path: Path) -> None:
    (job, *_) = jobs(load_grid({"tasks": ["rte"], "methods": [{"method": "lora", "lrs": [1e-3, 3e-3]}]}))
    old = job.spec() | {"method": job.method.to_dict()}
    rows = [
        {"id": "old", "stage": "sweep", "spec": old, "started": 1},
        {"id": "f", "stage": "final", "spec": old, "started": 2},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert done(tmp_path) == {job.id, "f"}
    store = Store(tmp_path)
    assert store.has(job.id)
    assert store.get(job.id)["spec"] == job.spec()
    assert store.get("f") == rows[1]


def test_published_rows_name_no_machine_and_no_folder(tmp_path: Path) -> None:
    machine = {"host": "mine", "threads": 1, "device": "cpu"}
    rows = [{"id": str(i), "started": "1", "data": data, "machine": machine} for i, data in enumerate(("/x", "hub"))]
    found = read_rows(publish(rows, tmp_path))
    assert [row["data"] for row in found] == ["a folder", "hub"]
    assert all(row["machine"] == {"threads": 1, "device": "cpu"} for row in found)
    assert rows[0]["machine"] == machine


def test_what_holds_no_results_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    store.put({"id": "a", "started": "1"})
    for content in ('{"id":', '{"id": "a"}', "3"):
        (tmp_path / "out" / "rows" / "a.json").write_text(content)
        for read in (read_rows, done):
            with pytest.raises(ValueError, match=r"rows/a\.json is damaged: delete it"):
                read(tmp_path / "out")
    other = tmp_path / "other.jsonl"
    for content, said in (('{"id": 3}', "holds no rows of results"), ('{"id": "a', "line 1 is not JSON")):
        other.write_text(content + "\n")
        with pytest.raises(ValueError, match=rf"other\.jsonl.*{said}"):
            read_rows(other)
