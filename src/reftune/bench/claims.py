"""Claims: which process works on which run, so that several share one grid without doing a run twice.

    claims = Claims(directory)
    with claims.take("sst2-lora-s0") as mine:
        if mine: ...

A claim is a small file that its owner touches every few seconds. One whose owner is dead (same machine) or has not
touched it for `stale` seconds (any machine) is taken over. Taking is done under a lock (`filelock`).
"""

import json
import os
import platform
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

BEAT = 20.0  # seconds between touches


class Claims:
    """The claims of one grid, files in `directory`. `stale`: seconds without a touch after which a claim is free."""

    def __init__(self, directory: Path, *, stale: float = 300.0, beat: float = BEAT) -> None:
        self.directory, self.stale, self.beat = directory, stale, beat
        directory.mkdir(parents=True, exist_ok=True)
        self.owner = {"host": _place(), "pid": os.getpid(), "token": uuid.uuid4().hex}

    @contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """True if the run is ours; then it stays so, and other processes see it, until the block ends."""
        path = self.directory / f"{name}.json"
        if not self._try(path):
            yield False
            return
        done = threading.Event()
        thread = threading.Thread(target=self._keep, args=(path, done), daemon=True)
        thread.start()
        try:
            yield True
        finally:
            done.set()
            thread.join()
            with self._lock():
                if self._read(path) == self.owner:
                    path.unlink(missing_ok=True)

    def live(self) -> list[str]:
        """The names of runs that somebody works on now."""
        now = self._now()
        return sorted(p.stem for p in self.directory.glob("*.json") if not self._free(p, now))

    def tidy(self) -> None:
        """Remove the claims whose owners are gone, such as of one killed when its run was done."""
        with self._lock():
            now = self._now()
            for path in self.directory.glob("*.json"):
                if self._free(path, now):
                    path.unlink(missing_ok=True)

    def _try(self, path: Path) -> bool:
        with self._lock():
            if path.exists() and not self._free(path, self._now()):
                return False
            work = path.with_suffix(f".{os.getpid()}.tmp")
            work.write_text(json.dumps(self.owner), encoding="utf-8")
            os.replace(work, path)
            return True

    def _now(self) -> float:
        """The time by the clock that stamps the claims: a file server's may differ from this machine's by minutes."""
        probe = self.directory / ".now"
        probe.touch()
        return probe.stat().st_mtime

    def _free(self, path: Path, now: float) -> bool:
        """Whether a claim's owner is gone."""
        try:
            age = now - path.stat().st_mtime
        except FileNotFoundError:
            return True
        owner = self._read(path)
        if owner is None or age > self.stale:
            return True
        return owner.get("host") == self.owner["host"] and not _alive(int(str(owner.get("pid"))))

    def _keep(self, path: Path, done: threading.Event) -> None:
        while not done.wait(self.beat):
            found = self._read(path)
            if found is not None and found != self.owner:  # taken over while this process was stopped
                return
            with suppress(OSError):  # a network file system may fail once
                os.utime(path)

    def _read(self, path: Path) -> dict[str, object] | None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and {"host", "pid", "token"} <= set(found) else None

    def _lock(self) -> FileLock:
        return FileLock(self.directory / ".lock")


def _place() -> str:
    """Where a process number means something: the machine, and on Linux the namespace of its processes."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
