"""Prefill and generation with an adapter, as ratios to the base; LoRA unmerged beside it.

    python benchmarks/inference.py --threads 2                       # SmolLM2-135M's shape, fp32, CPU
    python benchmarks/inference.py --shape llama2-7b --device cuda   # Llama-2-7B's shape, bf16

Random weights: speed does not depend on them. The methods take turns within each round, in an order that changes, in
one process; medians over the rounds, and the smallest and largest ratio of a round. Time is CPU time on a CPU and
synchronised wall time on a GPU. A prefill of one row, the shortest, gets five times the rounds. `--inside` times the
edits within each prefill instead (CPU): where a prefill takes seconds, its spread hides them.
"""

import argparse
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import reftune
from reftune import ReftConfig

SHAPES = {
    "smollm2-135m": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "llama2-7b": LlamaConfig(vocab_size=32000),
    "tiny": LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    ),
}  # fmt: skip
ADAPTERS = {
    "LoReFT r=4, mid, f2+l2": ReftConfig(r=4, positions="f2+l2", init_weights=False),
    "LoReFT r=4, all layers, f2+l2": ReftConfig(r=4, layers="all", positions="f2+l2", init_weights=False),
    "LoReFT r=4, all layers, all tokens": ReftConfig(r=4, layers="all", positions="all", init_weights=False),
    "LoRA r=8, all linear, unmerged": LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False),
}


def build(shape: str, device: str, only: list[str]) -> dict[str, torch.nn.Module]:
    """The base, and one model around the same weights for each adapter that one of `only` is part of the name of."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        base = LlamaForCausalLM(SHAPES[shape]).to(dtype).eval()
    models: dict[str, torch.nn.Module] = {"base": base}
    for name, config in ADAPTERS.items():
        if not any(part in name for part in only):
            continue
        with torch.device("meta"):
            copy = LlamaForCausalLM(SHAPES[shape])
        copy.load_state_dict(base.state_dict(), assign=True)
        copy.model.rotary_emb = base.model.rotary_emb  # its buffers are not in the state dict
        copy.tie_weights()
        models[name] = get_peft_model(copy.eval(), config).eval()
    return models


def measure(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one round to warm up."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        order = list(runs)
        random.Random(number).shuffle(order)
        for name in order:
            if device != "cpu":
                torch.cuda.synchronize()
            begin = clock()
            runs[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(clock() - begin)
    return seconds


def rows(what: str, seconds: dict[str, list[float]], per: int) -> list[str]:
    lines = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["base"], strict=True)]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        lines.append(f"| {what} | {name} | {1e3 * statistics.median(times) / per:.2f} | {ratio} |")
    return lines


def inside(model: torch.nn.Module, run: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """(seconds in the edits, seconds of all the rest) of each round, after one to warm up."""
    begun, spent = [0.0], [0.0]

    def before(*_: object) -> None:
        begun[0] = time.process_time()

    def after(*_: object) -> None:
        spent[0] += time.process_time() - begun[0]

    edits = [module for module in model.modules() if type(module).__name__ == "ReftLayer"]
    handles = [edit.register_forward_pre_hook(before) for edit in edits]
    handles += [edit.register_forward_hook(after) for edit in edits]
    found = []
    for _ in range(rounds + 1):
        spent[0], begin = 0.0, time.process_time()
        run()
        found.append((spent[0], time.process_time() - begin - spent[0]))
    for handle in handles:
        handle.remove()
    return found[1:]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument(
        "--new-tokens", type=int, nargs="+", default=[256, 16], help="for batch 1 and for the larger one"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the adapters to run")
    parser.add_argument("--inside", action="store_true", help="the edits' own time within a prefill")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    models = build(a.shape, a.device, a.only)
    where = torch.cuda.get_device_name() if a.device != "cpu" else f"{platform.machine()}, {a.threads} thread(s)"
    timed = "CPU" if a.device == "cpu" else "wall"
    print(f"`python benchmarks/inference.py {' '.join(sys.argv[1:])}`\n")
    print(f"{a.shape}, {where}; torch {torch.__version__}, transformers {transformers.__version__}, "
          f"peft {peft.__version__}, reftune {reftune.__version__}; "
          f"{a.rounds} rounds (five times as many for the prefill of one row), {timed} time, "
          f"prompts of {a.prompt} tokens\n")  # fmt: skip
    print("| | | ms | over the base |\n|---|---|---|---|")
    for batch, new in zip(a.batches, a.new_tokens, strict=True):
        ids = torch.randint(5, SHAPES[a.shape].vocab_size - 5, (batch, a.prompt), device=a.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        prefill = {name: partial(model, **inputs, logits_to_keep=1) for name, model in models.items()}
        if a.inside:
            for name in [name for name in models if "ReFT" in name]:
                times = inside(models[name], prefill[name], a.rounds)
                shares = [1 + edits / rest for edits, rest in times]
                own = statistics.median(edits for edits, _ in times)
                spread = f"{statistics.median(shares):.4f} ({min(shares):.4f}-{max(shares):.4f})"
                print(f"| edits within a prefill, batch {batch} | {name} | {1e3 * own:.2f} | {spread} |", flush=True)
            continue
        for line in rows(f"prefill, batch {batch}", measure(prefill, a.rounds * (5 if batch == 1 else 1), a.device), 1):
            print(line, flush=True)
        generate = {name: partial(model.generate, **inputs, **length) for name, model in models.items()}
        for line in rows(f"a token of {new}, batch {batch}", measure(generate, a.rounds, a.device), new):
            print(line, flush=True)


if __name__ == "__main__":
    main()
