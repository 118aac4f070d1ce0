"""Where entries are kept: in memory, or on a disk as memory-mapped safetensors that survive a restart.

    store = MemoryStore(budget)            # or DiskStore(directory, budget); on an accelerator: see device_store
    store.open(fingerprint)                # says what was found, forgets what belongs to another base
    store.put(key, entry); store.get(key)  # get: the entry, or None, never one that does not belong

An entry is a dict of tensors, kept on the CPU. A key names the tokens it was computed from: a changed row has another.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Entry = dict[str, Tensor]
Say = Callable[[str], None]


def size_of(entry: Mapping[str, Tensor]) -> int:
    """Bytes of an entry's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.values())


def size_words(size: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


class Store:
    """The frame of both: budget, counts, messages."""

    where = "memory"

    def __init__(self, budget: int | None = None) -> None:
        self.budget = self.default_budget() if budget is None else int(budget)
        if self.budget < 0:
            raise ValueError(f"reuse_budget is a number of bytes, 0 or more, but is {budget!r}.")
        self.used = self.found = self.computed = 0
        self.full = False
        self.say: Say = lambda text: None
        self.fingerprint: dict[str, str] | None = None

    def default_budget(self) -> int:
        raise NotImplementedError

    def open(self, fingerprint: dict[str, str]) -> None:
        raise NotImplementedError

    def get(self, key: str) -> Entry | None:
        raise NotImplementedError

    def put(self, key: str, entry: Entry) -> bool:
        """Keep an entry if there is room; False if it is not kept."""
        if self.full:
            return False
        size = size_of(entry)
        if self.used + size > self.budget:
            self.full = True
            self.say(
                f"Reuse: the budget of {size_words(self.budget)} ({self.where}) is used up; further examples are "
                "computed each time. Raise reuse_budget to keep them too."
            )
            return False
        if not self._write(key, entry):
            return False
        self.used += size
        return True

    def _write(self, key: str, entry: Entry) -> bool:
        raise NotImplementedError


def differences(mine: Mapping[str, str], other: Mapping[str, str]) -> str:
    """What two fingerprints differ in, in words."""
    return " and ".join(name for name in mine if mine[name] != other.get(name)) or "nothing known"


class MemoryStore(Store):
    """Entries in this process's memory; may be handed from one trainer to the next (`reuse=store`)."""

    def __init__(self, budget: int | None = None) -> None:
        super().__init__(budget)
        self.entries: dict[str, Entry] = {}

    def default_budget(self) -> int:
        """Half of the memory that is free now, to this machine or this container."""
        import psutil

        free = int(psutil.virtual_memory().available)
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
            free = min(free, limit - used)
        return max(0, free) // 2

    def open(self, fingerprint: dict[str, str]) -> None:
        if self.entries and self.fingerprint is not None and self.fingerprint != fingerprint:
            what = differences(fingerprint, self.fingerprint)
            self.say(f"Reuse: {len(self.entries)} kept entries are for other {what}; they are computed anew.")
            self.clear()
        self.fingerprint = fingerprint

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        self.used, self.full = 0, False

    def get(self, key: str) -> Entry | None:
        return self.entries.get(key)

    def _write(self, key: str, entry: Entry) -> bool:
        self.entries[key] = {name: tensor.cpu() for name, tensor in entry.items()}
        return True


class DiskStore(Store):
    """Entries as safetensors files in `directory/<fingerprint>/`; several processes may share it.

    A file is written whole or not at all. It names the key and the fingerprint it belongs to and carries a checksum;
    one that does not match is said, removed and computed anew.
    """

    def __init__(self, directory: str | os.PathLike[str], budget: int | None = None) -> None:
        self.root = Path(directory)
        self.where = str(self.root)
        super().__init__(budget)
        self.folder = self.root
        self._trusted: set[str] = set()

    def default_budget(self) -> int:
        """Half of the space that is free now."""
        where = next(path for path in (self.root, *self.root.resolve().parents) if path.exists())
        return shutil.disk_usage(where).free // 2

    def open(self, fingerprint: dict[str, str]) -> None:
        if fingerprint == self.fingerprint:
            return
        name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.fingerprint = self.root / name, fingerprint
        self._trusted.clear()
        self.used, self.full = 0, False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._replace(self.folder / "fingerprint.json", json.dumps(fingerprint, indent=1).encode())
        except OSError as error:
            self._stop(error)
            return
        for left in self.folder.glob("*/.*.safetensors.*"):  # of a process killed while it wrote
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()
        self.used = sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors"))
        for other in sorted(self.root.glob("*/fingerprint.json")):
            if other.parent != self.folder and not self.used:
                self._say_other(other, fingerprint)

    def _say_other(self, path: Path, fingerprint: dict[str, str]) -> None:
        try:
            what = differences(fingerprint, json.loads(path.read_text()))
        except (OSError, ValueError):
            what = "something unreadable"
        self.say(f"Reuse: {path.parent} is for other {what}, and is not used. Delete it if it is not needed any more.")

    def get(self, key: str) -> Entry | None:
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("key") != key or about.get("fingerprint") != self.folder.name:
                    raise ValueError("it belongs to something else")
                entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if key not in self._trusted and about.get("checksum") != _checksum(entry):
                raise ValueError("its contents do not match their checksum")
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            self.say(f"Reuse: {path} cannot be used ({error}); it is computed anew.")
            path.unlink(missing_ok=True)
            return None
        self._trusted.add(key)
        return entry

    def _write(self, key: str, entry: Entry) -> bool:
        from safetensors.torch import save

        entry = {name: tensor.cpu().contiguous() for name, tensor in entry.items()}
        about = {"key": key, "fingerprint": self.folder.name, "checksum": _checksum(entry)}
        path = self._path(key)
        try:
            path.parent.mkdir(exist_ok=True)
            self._replace(path, save(entry, about))
        except OSError as error:
            self._stop(error)
            return False
        return True

    def _stop(self, error: OSError) -> None:
        self.full = True
        self.say(
            f"Reuse: nothing more can be written to {self.folder} ({error.strerror or error}); what is missing is "
            "computed each time. Free some space, or name another reuse_dir."
        )

    def _replace(self, path: Path, content: bytes) -> None:
        work = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            work.write_bytes(content)
            os.replace(work, path)
        finally:
            work.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _checksum(entry: Mapping[str, Any]) -> str:
    total = 0
    for name in sorted(entry):
        raw = entry[name].contiguous().flatten().view(torch.uint8).numpy()
        total = zlib.crc32(raw, zlib.crc32(name.encode(), total))
    return f"{total:08x}"
