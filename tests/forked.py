"""Processes that tests start, forked from one server that has imported everything and computed nothing.

    process = Forked(train, directory, log=tmp_path / "log")
    assert process.wait() == 0, process.said()

Importing torch, transformers and peft takes a core ten seconds and more: so a test worker pays for it once, not once a
process. What is called must be a function of a module, and its arguments are pickled, as with `multiprocessing`.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "reftune.train.trainer", "reftune.bench.runner"])


class Forked:
    """A process that calls `call(*arguments)`; what it writes goes to the file `log`."""

    def __init__(self, call: Callable[..., Any], *arguments: Any, log: Path, environ: Mapping[str, str] = {}) -> None:
        self.log = log
        self._process = _CONTEXT.Process(target=_child, args=(call, arguments, dict(environ), str(log)))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 240) -> int | None:
        """Its exit code, -9 where it was killed; None, and it is killed, if it goes on for longer than so many
        seconds."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self.kill()
            self._process.join()
        return code

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def ranks(call: Callable[..., Any], *arguments: Any, logs: Path, count: int = 2) -> None:
    """Call it in `count` processes with the environment that torchrun gives to each, and wait for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "ACCELERATE_USE_CPU": "true"}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    processes = [
        Forked(
            call, *arguments, log=logs / f"rank{rank}.log",
            environ=place | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip
    codes = [process.wait() for process in processes]
    assert codes == [0] * count, "\n".join(process.said()[-4000:] for process in processes)


def _child(call: Callable[..., Any], arguments: tuple[Any, ...], environ: dict[str, str], log: str) -> None:
    os.environ.update(environ)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    call(*arguments)
