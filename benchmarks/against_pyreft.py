"""reftune beside pyreft at the same setting, and both beside LoRA: a training step, prefill, and generation.

    make peers                                     # pyreft 0.1.0 with transformers 4.57.6, in .peers/pyreft
    python benchmarks/against_pyreft.py --threads 1

pyreft needs old packages, so it runs in a process of its own (`peers/pyreft_worker.py`); the methods take turns within
every round, and what is timed is CPU time of the process that works. LoReFT r=4 with an intervention a layer for each
term of the positions (untied), SmolLM2-135M's shape, random weights, fp32; LoRA r=8 on all linear layers. A step is
forward, backward and AdamW on `batch` rows of `length` tokens, `response` of them labelled; "Trainer": as `ReftTrainer`
steps, with what it reuses, in the first epoch and in the later ones.
"""

import argparse
import json
import os
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
from train_step import Method, machine
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
    parser.add_argument("--response", type=int, default=12)
    parser.add_argument("--rows", type=int, default=1, help="rows of prefill and generation")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--what", nargs="+", default=["step", "prefill", "generate"])
    parser.add_argument("--write", type=Path, help="file for the table")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    depth = SHAPE["num_hidden_layers"]
    every = list(range(depth))
    setups = {
        f"layer {depth // 2}, f2+l2": ([depth // 2], "f2+l2"),
        "all layers, f2+l2": (every, "f2+l2"),
        "all layers, l2": (every, "l2"),
    }
    pyreft = Pyreft({**{k: v for k, v in vars(a).items() if k != "write"}, "shape": SHAPE, "setups": setups})
    ids = torch.randint(5, SHAPE["vocab_size"] - 5, (a.batch, a.length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : a.length - a.response] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))

    def twin() -> Any:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        model.load_state_dict(base.state_dict(), assign=True)
        model.model.rotary_emb = base.model.rotary_emb  # its buffers are not in the state dict
        model.tie_weights()
        return model.requires_grad_(False)

    lora = get_peft_model(twin(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    models: dict[str, Any] = {"LoRA": lora}
    methods: dict[str, Method] = {"LoRA": Method("LoRA", lora, None)}
    for name, (layers, positions) in setups.items():

        def reft(layers: Any = layers, positions: str = positions) -> Any:
            config = ReftConfig(r=4, layers=layers, positions=positions, init_weights=False, task_type="CAUSAL_LM")
            return get_reft_model(twin(), config)

        models[f"reftune, {name}"] = plain = reft()
        methods[f"reftune, {name}"] = Method(name, plain, None)
        methods[f"reftune, {name}, Trainer, first epoch"] = Method(name, reft(), None, "keep", True)
        methods[f"reftune, {name}, Trainer, later epochs"] = Method(name, reft(), None, "keep")

    rows = {"input_ids": ids[: a.rows], "attention_mask": torch.ones_like(ids[: a.rows])}
    length = {"max_new_tokens": a.new_tokens, "min_new_tokens": a.new_tokens, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def infer(what: str, model: Any) -> None:
        model(**rows) if what == "prefill" else model.generate(**rows, **length)

    lines = [
        f"`python benchmarks/against_pyreft.py {' '.join(sys.argv[1:])}`\n",
        f"{machine(torch.device('cpu'))}. SmolLM2-135M's shape, random weights, fp32, batch {a.batch} of {a.length} "
        f"tokens of which {a.response} labelled; inference with {a.rows} row(s) and {a.new_tokens} new tokens; "
        f"{a.rounds} interleaved rounds, CPU time. torch {torch.__version__}, transformers {transformers.__version__} "
        f"(pyreft 0.1.0: 4.57.6), peft {peft.__version__}, reftune {reftune.__version__}. Ratios: medians over the "
        "rounds (smallest and largest).\n",
        "| | method | CPU s | over LoRA | over pyreft |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for what in a.what:
        seconds: dict[str, list[float]] = {}
        for number in range(a.rounds + 1):
            runs: dict[str, Callable[[], float]] = {}
            if what == "step":
                runs |= {name: partial(cpu, partial(method.step, batch)) for name, method in methods.items()}
            else:
                runs |= {name: partial(cpu, partial(infer, what, m)) for name, m in {**models, "base": base}.items()}
            for name in setups:
                runs[f"pyreft, {name}"] = partial(pyreft, what, name)
            for one in methods.values():
                one.model.train(what == "step")
            for name in runs if number % 2 else reversed(runs):
                used = runs[name]()
                if number:
                    seconds.setdefault(name, []).append(used)
        for name in sorted(seconds):
            peer = seconds["pyreft" + name.removeprefix("reftune").split(", Trainer")[0]] if "reftune" in name else None
            cells = (what, name, f"{statistics.median(seconds[name]):.3f}", ratio(seconds[name], seconds["LoRA"]))
            lines.append("| " + " | ".join([*cells, ratio(seconds[name], peer) if peer else ""]) + " |")
            print(lines[-1], flush=True)
    if a.write:
        a.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


def ratio(mine: list[float], other: list[float]) -> str:
    each = [a / b for a, b in zip(mine, other, strict=True)]
    return f"{statistics.median(each):.3f} ({min(each):.3f}-{max(each):.3f})"


if __name__ == "__main__":
    main()
