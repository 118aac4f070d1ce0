"""Files of every kind are read; what cannot be read is said."""

import gzip
import json
from pathlib import Path

import pytest

from reftune.data import read_examples

ROWS = [{"prompt": "1+1", "completion": "2"}, {"prompt": "2+2", "completion": "4"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def _write(path: Path) -> Path:
    import pandas

    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    if path.name.endswith(".jsonl"):
        path.write_text(text)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif path.name.endswith(".parquet"):
        pandas.DataFrame(ROWS).to_parquet(path)
    else:
        pandas.DataFrame(ROWS).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.csv", "a.tsv"])
def test_a_file_of_each_kind(tmp_path: Path, name: str) -> None:
    rows = read_examples(str(_write(tmp_path / name)))
    assert rows.column_names == ["prompt", "completion"]
    assert [row["completion"] for row in rows] == ["2", "4"]
    assert len(read_examples(str(tmp_path / name), limit=1)) == 1


def test_the_demo_examples_come_with_the_package() -> None:
    rows = read_examples("reftune:emoji")
    assert len(rows) == 10
    with pytest.raises(FileNotFoundError, match="Known: reftune:emoji"):
        read_examples("reftune:nothing")


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        read_examples(str(tmp_path / "none.jsonl"))
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match="no kind that reftune reads"):
        read_examples(str(tmp_path / "a.txt"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": \n nonsense')
    with pytest.raises(ValueError, match="could not be read as json"):
        read_examples(str(tmp_path / "bad.jsonl"))
    (tmp_path / "empty.csv").write_text("prompt,completion\n")
    with pytest.raises(ValueError, match="has no rows"):
        read_examples(str(tmp_path / "empty.csv"))


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "has no rows"),
    "empty.jsonl.gz": (gzip.compress(b""), "has no rows"),
    "latin.jsonl": ('{"prompt":"caf\xe9","completion":"x"}\n'.encode("latin-1"), "Save it as UTF-8"),
    "latin.csv": ("prompt,completion\ncaf\xe9,x\n".encode("latin-1"), "Save it as UTF-8"),
    "utf16.csv": ("prompt,completion\na,b\n".encode("utf-16"), "Save it as UTF-8"),
    "bad.parquet": (b"not parquet", "could not be read as parquet: .*magic bytes"),
    "bad.jsonl.gz": (b"not gzip", "could not be read as json: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt":"a","completion":"b"}\n' * 9)[:-12], "could not be read as json"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_the_cause(tmp_path: Path, name: str) -> None:
    content, says = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} .*{says}"):
        read_examples(str(tmp_path / name))


def test_a_folder_without_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.json").write_text('{"a": 1}')
    (tmp_path / "model" / "b.json").write_text('{"b": "x"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"model could not be read as data: .* Name one of its files\."):
        read_examples("model")


def test_a_folder_is_read_by_its_whole_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    monkeypatch.chdir(tmp_path)
    assert len(read_examples("rows")) == len(read_examples(str(tmp_path / "rows"))) == 2


def test_a_csv_row_with_too_few_fields_has_no_answer(tmp_path: Path) -> None:
    (tmp_path / "short.csv").write_text("prompt,completion\na,None\nb\n")
    assert [row["completion"] for row in read_examples(str(tmp_path / "short.csv"))] == ["None", None]
