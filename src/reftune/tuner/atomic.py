"""Saving that a kill cannot tear: the weights file is the commit, and it carries the config it belongs to.

Everything is written into a temporary directory beside the target and moved file by file, the weights last. A save cut
off before that leaves the old weights, whose metadata hold the old config, which `ReftConfig.from_pretrained` then
takes; one cut off after it is complete.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
CONFIG = "adapter_config.json"
_KEY = "reftune_config"
_STAGING = ".saving-"
_BASE = ("base_model_name_or_path", "revision")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary directory in `target`, which is made; what killed saves left there more than an hour ago goes."""
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(f"{_STAGING}*"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=_STAGING, dir=target))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_atomically(directory: str | os.PathLike[str], write: Callable[[str], None]) -> None:
    """Let `write(temporary)` write an adapter and move it to `directory`; adapters in subdirectories too."""
    target = Path(directory)
    with staging(target) as temporary:
        write(str(temporary))
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda p: (p.name == WEIGHTS, str(p))):
            destination = target / path.relative_to(temporary)
            destination.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, destination)


def commit_config(directory: Path) -> None:
    """Write the config into the metadata of the weights beside it."""
    weights = directory / WEIGHTS
    if weights.exists():
        tensors = load_file(weights)
        save_file(tensors, weights, metadata={"format": "pt", _KEY: (directory / CONFIG).read_text()})


def config_beside_weights(directory: str | os.PathLike[str]) -> str | None:
    """The config (JSON) that local weights were saved with, or None. ValueError for a damaged file.

    Where the base lies is not bound to the weights: a config file that differs in nothing else was edited by hand,
    because the base has moved, and its name holds.
    """
    weights = Path(directory) / WEIGHTS
    if not weights.is_file():
        return None
    try:
        with safe_open(weights, framework="pt") as file:
            committed: str | None = (file.metadata() or {}).get(_KEY)
    except SafetensorError as error:
        raise ValueError(f"{weights} cannot be read: {error}. The file is damaged; save it again.") from error
    with suppress(OSError, ValueError, TypeError):
        there = json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))
        moved = {**json.loads(committed or ""), **{key: there[key] for key in _BASE if key in there}}
        return json.dumps(moved) if moved == there else committed
    return committed
