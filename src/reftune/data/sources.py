"""Read a data set: a JSONL, CSV or Parquet file, or a hub id. The reading itself is the library `datasets`.

rows = read_examples("train.jsonl")                       # one file, also .json, .csv, .parquet, .jsonl.gz
rows = read_examples("tatsu-lab/alpaca", split="train")   # the hub
rows = read_examples("reftune:emoji")                     # the demo's examples, which come with the package
"""

import contextlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_PACKED = (".gz", ".xz", ".bz2", ".zst")
_OURS = "reftune:"


def read_examples(source: str, *, split: str = "train", limit: int | None = None) -> Any:
    """A `datasets.Dataset`, the first `limit` rows of it if given.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: a file of another kind, a file or a folder that cannot be parsed, or no rows at all.
        ImportError: the package `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Reading data needs the package datasets: pip install 'reftune[cli]'.") from error

    path = _bundled(source) if source.startswith(_OURS) else Path(source)
    builder = _builder(path)
    if not path.is_dir() and (builder is not None or path.is_file() or path.is_absolute()):
        rows = _read_file(datasets, path, builder)
    else:
        with _told(source, "data", (datasets.exceptions.DatasetGenerationError, UnicodeDecodeError)):
            rows = datasets.load_dataset(source, split=split)
    if len(rows) == 0:
        raise ValueError(f"{source} has no rows. Give a data set with at least one example.")
    return rows.select(range(min(limit, len(rows)))) if limit is not None else rows


def _read_file(datasets: Any, path: Path, builder: str | None) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Check the path of the data.")
    if builder is None:
        raise ValueError(f"{path} is of no kind that reftune reads. Known: {', '.join(_BUILDERS)} (also packed, .gz).")
    with _told(path, builder, Exception):  # every kind has a reader and a packing with errors of their own
        options = _csv_options(datasets, path) if builder == "csv" else {}
        # A file is one split, "train", whatever it holds; `split` of a recipe is for the hub.
        rows = datasets.load_dataset(builder, data_files=str(path), split="train", **options)
        rows.data.validate(full=True)  # of JSON and Parquet, the encoding is not looked at before a row is read
        return rows


@contextlib.contextmanager
def _told(source: str | Path, kind: str, errors: Any) -> Iterator[None]:
    """Errors of reading as a ValueError that names the source and the first cause."""
    try:
        yield
    except errors as error:
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration) or "no data" in str(error):  # what `datasets` says of a file without rows
            raise ValueError(f"{source} has no rows. Give a data set with at least one example.") from error
        why = " ".join(str(cause).split()).rstrip(".")[:300]  # a cast's error lists all columns, each on a line
        hint = " Save it as UTF-8." if isinstance(cause, UnicodeDecodeError) or "UTF8" in why else ""
        hint = " Name one of its files." if Path(source).is_dir() else hint
        raise ValueError(f"{source} could not be read as {kind}: {why}.{hint}") from error


def _csv_options(datasets: Any, path: Path) -> dict[str, Any]:
    """Every column is text: an answer "1" must not come back as a number, nor "None" as nothing.

    A field that is empty or not there is nothing, for pandas does not tell the two apart.
    """
    import pandas

    separator = "\t" if ".tsv" in path.suffixes else ","
    names = pandas.read_csv(path, sep=separator, nrows=0).columns
    features = datasets.Features({str(name): datasets.Value("string") for name in names})
    return {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""]}


def _builder(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def _bundled(source: str) -> Path:
    name = source.removeprefix(_OURS)
    folder = resources.files("reftune.data")
    path = Path(str(folder / f"{name}.jsonl"))
    if not path.is_file():
        known = sorted(_OURS + Path(str(item)).stem for item in folder.iterdir() if item.name.endswith(".jsonl"))
        raise FileNotFoundError(f"There is no data set {source} in the package. Known: {', '.join(known)}.")
    return path
