"""A training step of ReFT with reuse beside PEFT's methods: time and memory over LoRA's on all linear layers.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py --model smollm2-135m --batch 8 --length 128 --device cpu \
        --write docs/benchmarks/train_step_cpu.md

Rows of `length` random tokens, the last `response` of them labelled. All methods run in one process on one base model
each, a step of each in every round; a step is forward, backward and AdamW. "First epoch" computes what will be kept,
"later epochs" find it. Time is CPU time on a CPU (all threads together) and synchronised wall time on a GPU. Memory is
a step's peak above what is loaded, by resident size on a CPU and by torch's allocator on a GPU; what is kept of the
examples, in the memory of the device, has a column of its own. Prints medians, quartiles and ratios as Markdown.
"""

import argparse
import copy
import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import reftune
from reftune import ReftConfig, get_reft_model
from reftune.models import load_model
from reftune.train.reuse import Reuse, store_near

LINEAR = "all-linear"


class Method:
    """A name, a model, and `step(batch)`, which trains on a batch; `fresh` forgets what is kept before each step."""

    def __init__(self, name: str, model: Any, limit: float | None, reuse: str = "off", fresh: bool = False) -> None:
        self.name, self.model, self.limit, self.fresh = name, model.train(), limit, fresh
        self.learns = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.learns, lr=1e-5, foreach=True) if self.learns else None
        self.store = store_near(next(model.parameters()).device, 10**12)
        self.reuse = Reuse(model, self.store, say=lambda text: print(text, file=sys.stderr)) if reuse != "off" else None
        self.keep = reuse == "keep"

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """The loss of one step."""
        if self.fresh:
            self.store.clear()
        prepared = self.reuse.prepare(batch, self.keep) if self.reuse else None
        if self.optimiser is None:  # the bare forward pass
            with torch.no_grad():
                return float(self.model(**batch).loss)
        if prepared is None:
            loss = self.model(**batch).loss
        else:
            with prepared.active():
                loss = self.model(**prepared.inputs).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return float(loss.detach())


def make_methods(base: Callable[[], Any], rank: int, wanted: list[str] | None) -> list[Method]:
    """All methods of the table, in its order; each has a base model of its own, made when it is wanted."""
    depth = base().config.num_hidden_layers
    upper = list(range(depth // 2, depth))

    def lora(**settings: Any) -> Any:
        return peft.get_peft_model(base(), peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **settings))

    def reft(layers: Any, positions: str) -> Any:
        return get_reft_model(base(), ReftConfig(r=rank, layers=layers, positions=positions, task_type="CAUSAL_LM"))

    def full() -> Any:
        return copy.deepcopy(base()).requires_grad_(True)  # trains weights that the others share

    mid = f"layer {depth // 2}"
    table: list[tuple[str, Callable[[], Any], float | None, str, bool]] = [
        ("LoRA r=8, all linear", lambda: lora(target_modules=LINEAR), None, "off", False),
        ("LoRA r=8, q and v", lambda: lora(target_modules=["q_proj", "v_proj"]), None, "off", False),
        ("DoRA r=8, all linear", lambda: lora(target_modules=LINEAR, use_dora=True), None, "off", False),
        ("full fine-tuning", full, None, "off", False),
        ("bare forward", lambda: base().requires_grad_(False), None, "off", False),
        ("LoReFT all layers f2+l2, no reuse", lambda: reft("all", "f2+l2"), None, "off", False),
        ("LoReFT all layers f2+l2", lambda: reft("all", "f2+l2"), 0.75, "once", False),
        (f"LoReFT {mid} f2+l2, first epoch", lambda: reft("mid", "f2+l2"), 0.58, "keep", True),
        (f"LoReFT {mid} f2+l2, later epochs", lambda: reft("mid", "f2+l2"), 0.42, "keep", False),
        ("LoReFT all layers l2, first epoch", lambda: reft("all", "l2"), 0.45, "keep", True),
        ("LoReFT all layers l2, later epochs", lambda: reft("all", "l2"), 0.12, "keep", False),
        (f"LoReFT {mid} and up l2, later epochs", lambda: reft(upper, "l2"), 0.08, "keep", False),
    ]
    chosen = [row for row in table if wanted is None or any(word in row[0] for word in wanted)]
    return [Method(name, make(), limit, reuse, fresh) for name, make, limit, reuse, fresh in chosen]


def clock(device: torch.device) -> float:
    """Seconds: CPU time of this process, or wall time after the device has caught up."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


class Peak:
    """Bytes above what was in use when it was entered, at most."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> "Peak":
        gc.collect()
        if self.device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # freed memory back to the system
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self.before = _status("VmRSS")
        else:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: Any) -> None:
        now = _status("VmHWM") if self.device.type == "cpu" else torch.cuda.max_memory_allocated()
        self.bytes = now - self.before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1]) * 1024


def batches(count: int, batch: int, length: int, response: int, vocabulary: int, device: Any) -> list[dict[str, Any]]:
    """Random tokens; labels on the last `response`."""
    torch.manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(3, vocabulary, (batch, length))
        labels = ids.clone()
        labels[:, : length - response] = -100
        prompt = torch.zeros_like(ids)
        prompt[:, : length - response] = 1
        tensors = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "prompt_mask": prompt}
        made.append({name: tensor.to(device) for name, tensor in tensors.items()})
    return made


def for_method(method: Method, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Only a ReFT model knows `prompt_mask`."""
    known = isinstance(method.model, peft.PeftModel) and "REFT" in str(method.model.peft_config["default"].peft_type)
    return batch if known else {k: v for k, v in batch.items() if k != "prompt_mask"}


def measure(methods: list[Method], data: list[dict[str, Any]], rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of every step, the peak memory of one and what is kept: {name: (times, (bytes, bytes))}."""
    times: dict[str, list[float]] = {method.name: [] for method in methods}
    memory: dict[str, tuple[int, int]] = {}
    for method in methods:
        for batch in data:  # warm-up; later epochs find everything
            method.step(for_method(method, batch))
        with Peak(device) as peak:
            method.step(for_method(method, data[0]))
        memory[method.name] = peak.bytes, method.store.used
    for number in range(rounds):
        for method in methods:
            batch = for_method(method, data[number % len(data)])
            start = clock(device)
            method.step(batch)
            times[method.name].append(clock(device) - start)
    return {name: (spent, memory[name]) for name, spent in times.items()}


def table(methods: list[Method], found: dict[str, Any]) -> str:
    """The results as Markdown."""
    reference, (reference_memory, _) = found[methods[0].name]
    lines = [
        "| training step | median ms | quartiles | ratio | spread of the ratio | at most | peak MB | ratio | kept MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        spent, (memory, kept) = found[method.name]
        each = [a / b for a, b in zip(spent, reference, strict=True)]
        low, middle, high = statistics.quantiles(spent, n=4) if len(spent) > 1 else spent * 3
        limit = f"{method.limit:.2f}" if method.limit else "–"
        lines.append(
            f"| {method.name} | {1000 * middle:.0f} | {1000 * low:.0f}–{1000 * high:.0f} | "
            f"{statistics.median(each):.3f} | {min(each):.3f}–{max(each):.3f} | {limit} | {memory / 1e6:.0f} | "
            f"{memory / max(1, reference_memory):.2f} | {kept / 1e6:.0f} |"
        )
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """What it ran on."""
    if device.type != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} thread(s)"


def load(name: str, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """A function that makes the base model: the weights of one loaded model, shared by those that do not train them."""
    if name.startswith("random:"):  # random:layers,width,heads,vocabulary
        layers, width, heads, vocabulary = map(int, name.removeprefix("random:").split(","))
        config = transformers.LlamaConfig(
            num_hidden_layers=layers, hidden_size=width, intermediate_size=int(width * 8 / 3) // 64 * 64,
            num_attention_heads=heads, num_key_value_heads=heads, vocab_size=vocabulary,
        )  # fmt: skip
        with device:  # made there: a CPU takes minutes to draw the numbers of a large model
            first = transformers.LlamaForCausalLM(config).to(dtype)
    else:
        first = load_model(name, dtype=dtype)[0].to(device)
    state = first.state_dict()

    def make() -> Any:
        with torch.device("meta"):
            model = type(first)(first.config)
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        for path, buffer in first.named_buffers():  # not in the state: rotary frequencies
            owner, _, leaf = path.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer
        return model.requires_grad_(False)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="smollm2-135m", help="as in reftune, or random:layers,width,heads,vocabulary"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--response", type=int, default=None, help="labelled tokens; a tenth of the length")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=2, help="different batches")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", help="words of the methods to run; the first one is the reference")
    parser.add_argument("--write", type=Path, help="file for the table")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    response = arguments.response or arguments.length // 10

    make = load(arguments.model, dtype, device)
    methods = make_methods(make, arguments.rank, arguments.only)
    vocabulary = methods[0].model.config.vocab_size
    data = batches(arguments.batches, arguments.batch, arguments.length, response, vocabulary, device)
    found = measure(methods, data, arguments.rounds, device)
    text = "\n".join(
        [
            f"`python benchmarks/train_step.py {' '.join(sys.argv[1:])}`\n",
            f"{machine(device)}. torch {torch.__version__}, transformers {transformers.__version__}, peft "
            f"{peft.__version__}, reftune {reftune.__version__}. {arguments.model}, {arguments.dtype}, batch "
            f"{arguments.batch}, {arguments.length} tokens of which {response} labelled, r={arguments.rank}, "
            f"{arguments.rounds} interleaved rounds; {'CPU' if device.type == 'cpu' else 'wall'} time.\n",
            table(methods, found),
        ]
    )
    print(text)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
