"""What many adapters on one model cost: memory, switching, and a batch whose rows have adapters of their own.

    python benchmarks/many.py --adapters 1000 --threads 1

The base is a random Llama of SmolLM2-135M's shape, for nothing here depends on its weights. Rounds of the compared
settings are interleaved; medians, and the smallest and largest.
"""

import argparse
import ctypes
import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import reftune


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def resident() -> tuple[int, int]:
    """Bytes of this process in use, and resident (Linux).

    In use is what glibc has handed out; with PYTHONMALLOC=malloc that is Python's objects too. Resident is that and the
    holes between, once what lies free at the end has gone back.
    """
    gc.collect()
    library = ctypes.CDLL(None)
    library.malloc_trim(0)
    library.mallinfo2.restype = _Heap
    heap = library.mallinfo2()
    with open("/proc/self/statm") as file:
        return heap.uordblks + heap.hblkhd, int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def medians(rounds: int, settings: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float, float]]:
    times: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(rounds + 1):
        for name, run in settings.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: (statistics.median(t[1:]), min(t[1:]), max(t[1:])) for name, t in times.items()}


def memory(adapters: int, positions: str, layers: str, loaded: bool) -> tuple[int, int, int, float]:
    """Bytes of the adapters' numbers, by how much more is in use and resident, and seconds of a switch."""
    model = reftune.get_reft_model(base(), reftune.ReftConfig(positions=positions, layers=layers)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)

        def more(name: str) -> None:
            if loaded:
                model.load_adapter(folder, name)
            else:
                model.add_adapter(name, reftune.ReftConfig(positions=positions, layers=layers))

        for number in range(20):
            more(f"w{number}")
        before = resident()
        for number in range(adapters):
            more(f"a{number}")
        used, grown = (now - then for now, then in zip(resident(), before, strict=True))
    own = adapters * 4 * sum(p.numel() for name, p in model.named_parameters() if ".w1." in name)
    switches = []
    for number in range(200):
        begin = time.perf_counter()
        model.set_adapter(f"a{number * 7 % adapters}")
        switches.append(time.perf_counter() - begin)
    return own, used, grown, statistics.median(switches)


@torch.no_grad()
def routing(rows: int, length: int, positions: str, layers: str, rounds: int, new_tokens: int) -> list[str]:
    model = reftune.get_reft_model(base(), reftune.ReftConfig(positions=positions, layers=layers)).eval()
    for number in range(rows):
        config = reftune.ReftConfig(positions=positions, layers=layers, init_weights=False)
        model.add_adapter(f"a{number}", config)
    ids = torch.randint(5, 40_000, (rows, length))
    names = [f"a{number}" for number in range(rows)]
    more = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for what, call in (
        ("prefill", lambda **given: model(**inputs, logits_to_keep=1, **given)),
        (f"{new_tokens} tokens", lambda **given: model.generate(**inputs, **more, **given)),
    ):

        def plain(call: Callable[..., object] = call) -> None:
            with model.disable_adapter():
                call()

        result = medians(rounds, {"base": plain, "one": call, "own": lambda call=call: call(adapter_names=names)})
        cells = [f"{1e3 * m:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})" for m, low, high in result.values()]
        ratios = (result["own"][0] / result["one"][0], result["own"][0] / result["base"][0])
        found.append("| " + " | ".join([what, layers, positions, *cells, *(f"{r:.3f}" for r in ratios)]) + " |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", default=["memory", "routing"])
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, reftune {reftune.__version__}, "
        f"{platform.machine()}, {a.threads} thread(s)\n"
    )
    if "memory" in a.what:
        print(
            "| layers | positions | | adapters | their bytes, MB | in use over it | resident over it | one switch, ms |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for layers, positions in (("mid", "f2+l2"), ("mid", "l1"), ("all", "l1")):
            count = a.adapters if layers == "mid" else a.adapters // 10
            for loaded in (False, True):
                found = []
                for allocator in (
                    "malloc",
                    "default",
                ):  # the first to count what is in use, the second as people run it
                    os.environ["PYTHONMALLOC"] = allocator
                    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # a fresh heap for each
                        found.append(process.submit(memory, count, positions, layers, loaded).result())
                (own, used, _, _), (_, _, grown, switch) = found
                shares = f"{used / own - 1:+.1%} | {grown / own - 1:+.1%} | {1e3 * switch:.2f}"
                how = "loaded" if loaded else "added"
                print(f"| {layers} | {positions} | {how} | {count} | {own / 1e6:.1f} | {shares} |", flush=True)
    if "routing" in a.what:
        print(f"\n{a.rows} rows of {a.length} tokens, ms: the base, all rows with one adapter, each row with its own\n")
        print("| | layers | positions | base | one | own | own / one | own / base |")
        print("|---|---|---|---|---|---|---|---|")
        for layers, positions in (("mid", "f2+l2"), ("all", "f2+l2"), ("all", "l1+gen")):
            for line in routing(a.rows, a.length, positions, layers, a.rounds, a.new_tokens):
                print(line, flush=True)


if __name__ == "__main__":
    main()
