"""Run by test_distributed.py, once in each process: train a tiny model and save it.

Modes: "ddp" trains with `Trainer`, "started" too, NodiReFT started by some rows. "fsdp" shards with torch's
`fully_shard` (FSDP2) block by block and checkpoints them, "fsdp_root" the model as a whole: accelerate, and so
`Trainer`, shards on accelerators only, but calls just this.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tiny_training import Rows, adapter, collate, losses, trainer

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model
from reftune.train.starting import StartByRows

STEPS, RATE = 5, 0.02


def reft(**settings: Any) -> Any:
    config = ReftConfig(r=4, layers="all", dropout=0.0, task_type="CAUSAL_LM", **({"init_weights": False} | settings))
    base = tiny_llama(layers=2)
    torch.manual_seed(1)
    return get_reft_model(base, config)


def with_trainer(directory: Path, batch: int, started: bool = False, **settings: Any) -> None:
    kind: dict[str, Any] = {"intervention": "nodireft", "positions": "all", "init_weights": True} if started else {}
    run = trainer(
        reft(**kind), directory, per_device_train_batch_size=batch, learning_rate=RATE, weight_decay=0.1,
        max_steps=STEPS, save_strategy="steps", save_steps=3, **settings,
    )  # fmt: skip
    if started:
        run.add_callback(StartByRows(Rows(8).rows, run, print))
    run.train()
    if run.args.world_size > 1:  # every process holds the same adapter
        mine = torch.cat([value.flatten() for value in adapter(run.model).values()])
        theirs = mine.clone()
        torch.distributed.broadcast(theirs, 0)
        assert torch.equal(mine, theirs)
    run.save_model(str(directory / "saved"))
    if run.args.process_index == 0:
        (directory / "losses.json").write_text(json.dumps(losses(run)))


def by_hand(model: Any, rank: int = 0, processes: int = 1) -> list[float]:
    """Batches of 4 rows, shared out between the processes; the loss is the mean of theirs."""
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.1)
    rows, count, seen = Rows(4 * STEPS).rows, 4 // processes, []
    for step in range(STEPS):
        first = 4 * step + count * rank
        loss = torch.stack([model(**collate([row])).loss for row in rows[first : first + count]]).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.detach() / processes
        if processes > 1:
            torch.distributed.all_reduce(mean)
        seen.append(mean.item())
    return seen


def sharded(directory: Path, root_only: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (processes,))
    model = reft()
    if not root_only:
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    fully_shard(model, mesh=mesh)
    seen = by_hand(model, rank, processes)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(5, 13)[None]).logits
    model.save_pretrained(str(directory / "saved"), is_main_process=rank == 0)
    # as accelerate gathers it for Trainer.save_model
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(str(directory / "gathered"), state_dict=state)
        torch.save(logits, directory / "logits.pt")
        (directory / "losses.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


def main(mode: str, directory: Path) -> None:
    if mode in ("ddp", "started"):
        with_trainer(directory, 2, started=mode == "started", ddp_backend="gloo")
    else:
        sharded(directory, root_only=mode == "fsdp_root")
