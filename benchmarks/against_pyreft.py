"""reftune beside pyreft at the same setting, and both beside LoRA: a training step, prefill, and generation.

    make peers                                     # pyreft 0.1.0 with transformers 4.57.6, in .peers/pyreft
    python benchmarks/against_pyreft.py --threads 1

pyreft needs old packages, so it runs in a process of its own (`peers/pyreft_worker.py`); the methods take turns within
every round, and what is timed is CPU time of the process that works. LoReFT r=4 with a prefix and a suffix intervention
a layer (`f2+l2`, untied), SmolLM2-135M's shape, random weights, fp32; LoRA r=8 on all linear layers. A step is forward,
backward and AdamW on `batch` rows of `length` tokens, `response` of them labelled.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import reftune
from reftune import ReftConfig, get_reft_model

HERE = Path(__file__).parent
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


class Pyreft:
    """The worker process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent / ".peers" / "pyreft")}
        command = [sys.executable, str(HERE / "peers" / "pyreft_worker.py"), json.dumps(settings)]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def __call__(self, what: str, name: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"what": what, "name": name}) + "\n")
        self.process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit("The pyreft process ended. Is it installed? Run `make peers` first.")


def cpu(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--response", type=int, default=13)
    parser.add_argument("--rows", type=int, default=1, help="rows of prefill and generation")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", nargs="+", default=["mid", "all"])
    parser.add_argument("--what", nargs="+", default=["step", "prefill", "generate"])
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    pyreft = Pyreft({**vars(a), "shape": SHAPE})
    ids = torch.randint(5, SHAPE["vocab_size"] - 5, (a.batch, a.length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : a.length - a.response] = -100

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    models: dict[str, Any] = {}
    for name, config in {
        **{f"reftune, {at}": ReftConfig(r=4, layers=at, positions="f2+l2", init_weights=False) for at in a.layers},
        "LoRA": LoraConfig(r=8, target_modules="all-linear"),
    }.items():
        twin = LlamaForCausalLM(LlamaConfig(**SHAPE))
        twin.load_state_dict(base.state_dict())
        models[name] = get_reft_model(twin, config) if isinstance(config, ReftConfig) else get_peft_model(twin, config)
    learned = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    optimisers = {name: torch.optim.AdamW(learned[name], lr=1e-4, weight_decay=0.0) for name in models}

    def step(name: str) -> None:
        models[name].train()
        models[name](input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimisers[name].step()
        optimisers[name].zero_grad()

    rows = {"input_ids": ids[: a.rows], "attention_mask": torch.ones_like(ids[: a.rows])}
    length = {"max_new_tokens": a.new_tokens, "min_new_tokens": a.new_tokens, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def infer(what: str, model: Any) -> None:
        model.eval()
        model(**rows) if what == "prefill" else model.generate(**rows, **length)

    print(f"SmolLM2-135M's shape, fp32, {platform.machine()}, {a.threads} thread(s), batch {a.batch} × {a.length} "
          f"({a.response} labelled), inference with {a.rows} row(s) and {a.new_tokens} new tokens; "
          f"{a.rounds} rounds; torch {torch.__version__}, transformers {transformers.__version__} "
          f"(pyreft 0.1.0: 4.57.6), peft {peft.__version__}, reftune {reftune.__version__}\n")  # fmt: skip
    print("| | method | CPU s | over LoRA | over pyreft |\n|---|---|---|---|---|")
    for what in a.what:
        seconds: dict[str, list[float]] = {}
        for number in range(a.rounds + 1):
            runs: dict[str, Callable[[], float]] = {}
            for name, model in [*models.items(), *([] if what == "step" else [("base", base)])]:
                runs[name] = partial(cpu, partial(step, name) if what == "step" else partial(infer, what, model))
            for at in a.layers:
                runs[f"pyreft, {at}"] = partial(pyreft, what, at)
            for name in runs if number % 2 else reversed(runs):
                used = runs[name]()
                if number:
                    seconds.setdefault(name, []).append(used)
        for name in sorted(seconds):
            peer = seconds.get(name.replace("reftune", "pyreft")) if name.startswith("reftune") else None
            cells = (what, name, f"{statistics.median(seconds[name]):.3f}", ratio(seconds[name], seconds["LoRA"]))
            print("| " + " | ".join([*cells, ratio(seconds[name], peer) if peer else ""]) + " |", flush=True)


def ratio(mine: list[float], other: list[float]) -> str:
    each = [a / b for a, b in zip(mine, other, strict=True)]
    return f"{statistics.median(each):.3f} ({min(each):.3f}-{max(each):.3f})"


if __name__ == "__main__":
    main()
