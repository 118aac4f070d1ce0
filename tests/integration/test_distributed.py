"""Two processes on the CPU: data parallel is the single process with the double batch, and FSDP2 is close to it."""

import json
from pathlib import Path

import distributed_worker
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_training import adapter
from torch import Tensor

from conftest import tiny_llama
from forked import ranks
from reftune.interventions.orthogonal import orthonormality_error

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def launch(mode: str, directory: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the saved adapter of a run in two processes."""
    directory.mkdir(exist_ok=True)
    ranks(distributed_worker.main, mode, directory, logs=directory)
    saved = load_file(directory / "saved" / "adapter_model.safetensors")
    if mode != "started":  # whose R is free
        assert all(orthonormality_error(v) < 1e-5 for k, v in saved.items() if k.endswith(".R"))
    return json.loads((directory / "losses.json").read_text()), saved


@pytest.mark.parametrize("mode", ["ddp", "started"])
def test_data_parallel_is_one_process_with_the_double_batch(mode: str, tmp_path: Path) -> None:
    losses, saved = launch(mode, tmp_path / "two")
    distributed_worker.with_trainer(tmp_path / "one", batch=4, started=mode == "started")
    assert losses == pytest.approx(json.loads((tmp_path / "one" / "losses.json").read_text()), rel=1e-4)
    expected = load_file(tmp_path / "one" / "saved" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-4)
    assert (tmp_path / "two" / "checkpoint-3" / "adapter_model.safetensors").exists()
    assert not list((tmp_path / "two" / "checkpoint-3").glob("model*"))


@pytest.mark.parametrize("mode", ["fsdp", "fsdp_root"], ids=["blocks", "whole_model"])
def test_fsdp2_is_close_to_one_process(mode: str, tmp_path: Path) -> None:
    """R lies in pieces, so it is made orthonormal where it is used and when it is saved, not in place."""
    losses, saved = launch(mode, tmp_path)
    model = distributed_worker.reft()
    expected = distributed_worker.by_hand(model)
    assert losses == pytest.approx(expected, rel=1e-3)
    model.save_pretrained(str(tmp_path / "one"))
    single = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert saved.keys() == single.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value, single[name], rtol=0, atol=0.03)  # of steps of 5 times 0.02

    gathered = load_file(tmp_path / "gathered" / "adapter_model.safetensors")
    assert all(torch.equal(gathered[name], saved[name]) for name in saved)
    loaded = PeftModel.from_pretrained(tiny_llama(layers=2), str(tmp_path / "saved")).eval()
    assert len(adapter(loaded)) == len(saved)
    with torch.no_grad():
        logits = loaded(input_ids=torch.arange(5, 13)[None]).logits
    torch.testing.assert_close(logits, torch.load(tmp_path / "logits.pt"), rtol=1e-4, atol=1e-5)
