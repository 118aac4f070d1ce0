"""What a sweep's run has trained, kept for the final run of its seed, which would train the same again.

Where rates are chosen by whole runs, the run with the best rate *is* that final run, but for its test. What it trained
is kept in its work folder until the final run is done.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .training import Fit


def numbers(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all that training changes, on the CPU, by name: parameters, and the buffers that lie beside them."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _changing(model)}


@torch.no_grad()
def put_back(model: Any, kept: dict[str, torch.Tensor]) -> None:
    """Write what `numbers` copied into the model that it was of, or into another like it."""
    for name, tensor in _changing(model):
        tensor.copy_(kept[name])


def _changing(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(prefix, recurse=False))
        learned = {name: p for name, p in own.items() if p.requires_grad}
        yield from learned.items()
        if learned:
            yield from module.named_buffers(prefix, recurse=False)


def keep(model: Any, fitted: Fit, work: Path) -> None:
    """Write a trained run to its work folder."""
    write(work / "trained.pt", {"trained": numbers(model), "fit": dataclasses.asdict(fitted)})


def tidy(work: Path) -> None:
    """Remove the checkpoints of a run that is done and kept."""
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def is_kept(work: Path) -> bool:
    """Whether a trained run lies in this work folder."""
    return (work / "trained.pt").is_file()


def take(model: Any, work: Path) -> Fit:
    """Make the untrained model the trained one that lies in the work folder."""
    kept = torch.load(work / "trained.pt")
    put_back(model, kept["trained"])
    model.eval()
    return Fit(**kept["fit"])


def write(file: Path, content: dict[str, Any]) -> None:
    """torch.save, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_suffix(".tmp")
    torch.save(content, work)
    os.replace(work, file)
