"""How a training step grows: with sequence length, the base's depth, rank, edited layers, and the size of the data set.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --write docs/benchmarks/scaling_cpu.md

One axis at a time, the others at the values of `HERE`. LoRA (all linear layers, of the same rank) beside LoReFT on `l2`
without reuse, and with it in the first epoch and in the later ones. Time, memory and rounds as in `train_step.py`, on
random weights of SmolLM2-135M's shape. The data-set axis trains whole epochs and says what is kept.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from train_step import LINEAR, Method, Peak, batches, clock, for_method, machine, measure
from transformers import LlamaConfig, LlamaForCausalLM

import reftune
from reftune import ReftConfig, get_reft_model

HERE = {"length": 128, "depth": 30, "rank": 4, "sites": 30}
AXES: dict[str, list[int]] = {
    "length": [64, 256, 1024, 2048],
    "depth": [10, 20, 30],
    "rank": [1, 4, 16, 64],
    "sites": [1, 8, 15, 30],
}
KINDS = ("LoRA", "LoReFT, no reuse", "LoReFT, first epoch", "LoReFT, later epochs")


def base(depth: int) -> Any:
    """SmolLM2-135M's shape with this depth; the same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=depth, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(_DEVICE).requires_grad_(False)


def method(kind: str, depth: int, rank: int, sites: int) -> Method:
    """One of `KINDS`; the edited layers are the last `sites`."""
    if kind == "LoRA":
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, task_type="CAUSAL_LM")
        return Method(kind, peft.get_peft_model(base(depth), config), None)
    layers = list(range(depth - min(sites, depth), depth))
    model = get_reft_model(base(depth), ReftConfig(r=rank, layers=layers, positions="l2", task_type="CAUSAL_LM"))
    return Method(kind, model, None, "off" if "no reuse" in kind else "keep", "first" in kind)


def axis(name: str, values: list[int], batch: int, rounds: int) -> Iterator[str]:
    """The lines of one axis's table."""
    yield f"| {name} | " + " | ".join(f"{kind}, ms" for kind in KINDS) + " | over LoRA | peak MB | kept MB a row |"
    yield "|" + "---|" * (len(KINDS) + 4)
    for value in values:
        at = {**HERE, name: value}
        methods = [method(kind, at["depth"], at["rank"], at["sites"]) for kind in KINDS]
        data = batches(1, batch, at["length"], at["length"] // 10, 49152, _DEVICE)
        found = measure(methods, data, rounds, _DEVICE)
        spent = [statistics.median(found[kind][0]) for kind in KINDS]
        peaks = " / ".join(f"{found[kind][1][0] / 1e6:.0f}" for kind in KINDS)
        ratios = " / ".join(f"{s / spent[0]:.2f}" for s in spent[1:])
        kept = found[KINDS[-1]][1][1] / batch / 1e6
        yield f"| {value} | " + " | ".join(f"{1e3 * s:.0f}" for s in spent) + f" | {ratios} | {peaks} | {kept:.2f} |"
        del methods
        gc.collect()


def epochs(sizes: list[int], batch: int) -> Iterator[str]:
    """The lines of the data-set axis's table: whole epochs, with and without reuse."""
    yield "| rows | LoRA, s an epoch | LoReFT, first epoch, s | later epochs, s | kept MB | peak MB, later epochs |"
    yield "|---|---|---|---|---|---|"
    for size in sizes:
        lora, reft = method("LoRA", **_SHAPE), method("LoReFT, later epochs", **_SHAPE)
        data = batches(size // batch, batch, HERE["length"], HERE["length"] // 10, 49152, _DEVICE)
        spent = []
        for one in (lora, reft, reft):
            with Peak(_DEVICE) as peak:
                begin = clock(_DEVICE)
                for inputs in data:
                    one.step(for_method(one, inputs))
                spent.append(clock(_DEVICE) - begin)
        cells = " | ".join(f"{s:.1f}" for s in spent)
        yield f"| {size} | {cells} | {reft.store.used / 1e6:.0f} | {peak.bytes / 1e6:.0f} |"


_DEVICE = torch.device("cpu")
_SHAPE = {name: HERE[name] for name in ("depth", "rank", "sites")}


def main() -> None:
    global _DEVICE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", default=[*AXES, "rows"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256], help="data-set sizes, in batches of 8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, help="file for the tables")
    a = parser.parse_args()
    _DEVICE = torch.device(a.device)
    lines = [
        f"`python benchmarks/scaling.py {' '.join(sys.argv[1:])}`\n",
        f"{machine(_DEVICE)}. torch {torch.__version__}, transformers {transformers.__version__}, peft "
        f"{peft.__version__}, reftune {reftune.__version__}. SmolLM2-135M's shape, random weights, fp32, {a.batch} "
        f"row(s), medians of {a.rounds} interleaved rounds, {'CPU' if a.device == 'cpu' else 'wall'} time. Where not "
        f'varied: {", ".join(f"{k} {v}" for k, v in HERE.items())}. "over LoRA": without reuse / first / later '
        "epochs; peaks in the order of the columns.\n",
    ]
    for name in a.axes:
        lines.append(f"\n## {'Data set' if name == 'rows' else name.capitalize()}\n")
        print(lines[-1], flush=True)
        for line in epochs(a.rows, 8) if name == "rows" else axis(name, AXES[name], a.batch, a.rounds):
            lines.append(line)
            print(line, flush=True)
    if a.write:
        a.write.parent.mkdir(parents=True, exist_ok=True)
        a.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
