"""Read JSON Lines, packed by gzip or not; whatever is wrong names the file and the line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not blank, from 1, and what it holds."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}. Pack it with gzip anew.") from error
    # not splitlines of the text: that would cut at characters such as U+2028 inside a JSON string
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield number, _value(line, f"{path}, line {number}")


def _value(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: save it as UTF-8.") from error
    except json.JSONDecodeError as error:  # its own "line 1" is not the file's
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
