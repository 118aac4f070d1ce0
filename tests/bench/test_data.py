"""Rows and how they are shared out."""

import csv
import gzip
from pathlib import Path
from typing import Any

import pytest
from tests.bench.places import DATA, tiny_data, write_rows

from reftune.bench.data import data_folder, load_rows, split
from reftune.bench.tasks import SUITES, task


def test_a_folder_is_read_and_what_it_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_data(tmp_path)
    rows = load_rows(task("rte"), tmp_path)
    assert {name: len(found) for name, found in rows.items()} == {"train": 24, "validation": 16}
    with pytest.raises(FileNotFoundError, match=r"glue/sst2/train\.jsonl\.gz"):
        load_rows(task("sst2"), tmp_path)
    with pytest.raises(FileNotFoundError, match="your own CSV files"):
        load_rows(task("storycloze"), tmp_path)
    with pytest.raises(ValueError, match="not on the hub"):
        load_rows(task("addsub"), None)
    monkeypatch.setenv("REFTUNE_DATA", str(tmp_path))
    assert data_folder(None) == tmp_path
    with pytest.raises(FileNotFoundError, match="no data folder"):
        data_folder(str(tmp_path / "nowhere"))


def test_the_hub_is_read_by_its_own_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        return [{"goal": "g", "sol1": "a", "sol2": "b", "label": label} for label in (1, -1)]

    monkeypatch.setattr("datasets.load_dataset", load)
    rows = load_rows(task("piqa"), None)
    assert asked == [("baber/piqa", None, "train"), ("baber/piqa", None, "validation")]
    assert [len(found) for found in rows.values()] == [1, 1]  # a hidden label is left out


def test_glue_halves_validation_by_the_seed() -> None:
    rows = {"train": [{"n": i} for i in range(50)], "validation": [{"n": i} for i in range(100)]}
    one, again, two = (split(task("rte"), rows, seed=s, train=None, select=None, test=None) for s in (1, 1, 2))
    assert one == again
    assert one.digest != two.digest
    assert (len(one.train), len(one.select), len(one.test)) == (50, 50, 50)
    assert not {r["n"] for r in one.select} & {r["n"] for r in one.test}
    assert one.train == two.train  # the same rows for all seeds; the order is the trainer's
    large = {"train": [{"n": 0}], "validation": [{"n": i} for i in range(5001)]}
    found = split(task("qnli"), large, seed=0, train=None, select=None, test=None)
    assert (len(found.select), len(found.test)) == (1000, 4001)


def test_text_tasks_select_on_training_rows_and_never_on_the_test() -> None:
    rows = {"train": [{"n": i} for i in range(100)], "test": [{"n": 1000 + i} for i in range(30)]}
    found = split(task("addsub"), rows, seed=0, train=20, select=None, test=8)
    assert (len(found.train), len(found.select), len(found.test)) == (20, 10, 8)
    assert not {r["n"] for r in found.train} & {r["n"] for r in found.select}
    assert all(r["n"] >= 1000 for r in found.test)
    smaller = split(task("addsub"), rows, seed=3, train=5, select=None, test=4)
    assert smaller.train == found.train[:5]
    assert smaller.test == found.test[:4]
    hub = split(task("alpaca"), {"train": rows["train"]}, seed=0, train=None, select=None, test=None)
    assert len({r["n"] for part in (hub.train, hub.select, hub.test) for r in part}) == 100


def test_a_few_training_rows_leave_one_to_select_by() -> None:
    """Without one, all rates of a sweep would be alike."""
    for count, held in ((1, 0), (2, 1), (9, 1), (19, 1), (20, 2)):
        rows = {"train": [{"question": str(i)} for i in range(count)], "test": [{"question": "t"}]}
        parts = split(task("addsub"), rows, seed=0, train=None, select=None, test=None)
        assert (len(parts.select), len(parts.train)) == (held, count - held)


def test_a_task_without_the_rows_it_needs_says_so() -> None:
    some = [{"n": 1}]
    for name, rows, said in (
        ("rte", {"train": some}, "rte needs rows in validation, but has them in train alone"),
        ("addsub", {"test": some}, "addsub needs rows in train, but has them in test alone"),
        ("rte", {"train": [], "validation": some}, "rte needs rows in train, but has them in validation alone"),
        ("rte", {"train": [], "validation": []}, "rte needs rows in train and validation, but has none"),
        ("rte", {"train": some, "validation": some}, "at least two rows in validation"),
        ("alpaca_eval", {}, "alpaca_eval has no rows to be tested on"),
    ):
        with pytest.raises(ValueError, match=said):
            split(task(name), rows, seed=0, train=None, select=None, test=None)


def test_a_file_of_a_data_set_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(kind: str, data_files: str, split: str) -> list[dict[str, Any]]:
        assert (kind, data_files, split) == ("json", "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json", "train")
        return [{"instruction": "i", "output": "o", "generator": "g"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert load_rows(task("alpaca_eval"), None) == {"test": [{"instruction": "i", "input": "", "output": "o"}]}


def test_storycloze_from_the_users_own_files(tmp_path: Path) -> None:
    place = tmp_path / "commonsense" / "storycloze"
    place.mkdir(parents=True)
    fields = ["InputStoryid", *(f"InputSentence{i}" for i in range(1, 5))]
    fields += ["RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding"]
    for name, count in (("cloze_test_val__winter2018.csv", 3), ("cloze_test_test__spring2016.csv", 2)):
        with (place / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(fields)
            writer.writerows([[i, "A.", "B.", "C.", "D.", "Good.", "Bad.", "2"] for i in range(count)])
    rows = load_rows(task("storycloze"), tmp_path)
    assert {name: len(found) for name, found in rows.items()} == {"train": 3, "test": 2}
    assert rows["train"][0] == {"context": "", "question": "A. B. C. D.", "choices": ["Good.", "Bad."], "answer": 1}
    for name, ending in (("cloze_test_val__spring2016.csv", True), ("cloze_test_test__winter2018.csv", False)):
        with (place / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(fields if ending else fields[:-1])
            writer.writerow([9, "A.", "B.", "C.", "D.", "Good.", "Bad.", "1"][: len(fields) - (not ending)])
    more = load_rows(task("storycloze"), tmp_path)  # two files to train on, and one without right endings
    assert {name: len(found) for name, found in more.items()} == {"train": 4, "test": 2}
    wrong = place / "cloze_test_val__wrong.csv"
    for row, said in (
        ("9,A.,B.,C.,D.,Good.,Bad.,3", "row 1: AnswerRightEnding must be 1 or 2, but is '3'"),
        ("9,A.,B.", "row 1: AnswerRightEnding must be 1 or 2, but is None"),
    ):
        wrong.write_text(f"{','.join(fields)}\n{row}\n")
        with pytest.raises(ValueError, match=f"{wrong.name}, {said}"):
            load_rows(task("storycloze"), tmp_path)
    wrong.write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=f"{wrong.name} is not UTF-8"):
        load_rows(task("storycloze"), tmp_path)
    wrong.unlink()
    (place / "cloze_test_val__spring2016.csv").unlink()
    next(place.glob("*test__spring*")).unlink()
    assert {name: len(found) for name, found in load_rows(task("storycloze"), tmp_path).items()} == {
        "train": 1,
        "test": 2,
    }


def test_a_line_separator_inside_a_text_does_not_cut_a_row(tmp_path: Path) -> None:
    place = tmp_path / "glue" / "cola"
    write_rows(place, train=[])
    (place / "train.jsonl").write_text('{"sentence1": "a\u2028b", "sentence2": null, "label": 1}\n', encoding="utf-8")
    (place / "train.jsonl.gz").unlink()
    assert load_rows(task("cola"), tmp_path)["train"][0]["sentence1"] == "a\u2028b"


PAIR = {"sentence1": "a", "sentence2": "b", "label": 1}
CHOICE = {"context": "", "question": "q", "choices": ["a", "b"], "answer": 1}
WRONG: list[tuple[str, Any, str]] = [
    ("rte", {"a": 1}, "sentence1 must be text, but is not there"),
    ("rte", PAIR | {"sentence2": None}, "sentence2 must be text, but is None"),
    ("rte", PAIR | {"label": 7}, "label must be a whole number from 0 to 1, but is 7"),
    ("rte", PAIR | {"label": "yes"}, "label must be a whole number from 0 to 1, but is 'yes'"),
    ("rte", PAIR | {"label": 0.5}, "label must be a whole number"),
    ("rte", 1, "must be an object of fields, but is 1"),
    ("stsb", PAIR | {"label": float("nan")}, "label must be a number, but is nan"),
    ("arc_easy", CHOICE | {"answer": 2}, "answer must be a whole number from 0 to 1"),
    ("arc_easy", CHOICE | {"choices": ["a", None]}, "choices must be a list of texts"),
    ("boolq", CHOICE | {"answer": -1}, "answer must be a whole number from 0 to 1"),
    ("gsm8k", {"question": "q", "answer": "many"}, "answer must be a number, but is 'many'"),
    ("aqua", {"question": "q", "choices": list("abcdef"), "answer": 5}, "answer must be a whole number from 0 to 4"),
    ("alpaca", {"instruction": "i", "output": None}, "output must be text"),
    ("ultrafeedback", {"prompt": "p", "chosen": "c"}, "rejected must be text, but is not there"),
]


@pytest.mark.parametrize(("name", "row", "said"), WRONG)
def test_a_row_that_no_run_could_use_is_named(tmp_path: Path, name: str, row: Any, said: str) -> None:
    write_rows(tmp_path / task(name).suite / name, train=[row])
    with pytest.raises(ValueError, match=rf"{name}/train\.jsonl\.gz, row 1: {said}"):
        load_rows(task(name), tmp_path)


def test_fields_that_a_task_does_not_read_may_lack(tmp_path: Path) -> None:
    for name, row in (("cola", {"sentence1": "a", "label": 1}), ("boolq", {"question": "q", "answer": 0})):
        write_rows(tmp_path / task(name).suite / name, train=[row])
        assert load_rows(task(name), tmp_path)["train"] == [row]
        cloze = task(name).cloze
        assert cloze is not None
        assert cloze(row).index == row["label" if name == "cola" else "answer"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("train.jsonl", b'{"sentence1": "a"', "line 1 is not JSON: Expecting"),
        ("train.jsonl", b'\n{"sentence1": "\xe9"}', "line 2 is not UTF-8 text: save it as UTF-8"),
        ("train.jsonl.gz", b"nogz", "cannot be unpacked: Not a gzipped file"),
        ("train.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot be unpacked"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: bytes, said: str) -> None:
    place = tmp_path / "glue" / "rte"
    place.mkdir(parents=True)
    (place / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}.*{said}"):
        load_rows(task("rte"), tmp_path)


@pytest.mark.skipif(DATA is None, reason="the project's data folder (../shared/data) is not here")
@pytest.mark.parametrize("suite", SUITES)
def test_every_task_of_the_data_folder_makes_items(suite: str) -> None:
    for name in SUITES[suite]:
        if name == "storycloze":
            continue
        parts = split(task(name), load_rows(task(name), DATA), seed=0, train=20, select=10, test=20)
        assert len(parts.test) == 20
        assert len(parts.train) == (20 if task(name).trains else 0)
        if suite != "glue":
            for row in [*parts.train, *parts.test]:
                found = task(name).item(row)  # type: ignore[union-attr]
                assert found.response
                assert not found.choices or found.choices[found.index] == found.response
