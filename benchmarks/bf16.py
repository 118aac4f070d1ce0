"""What bf16 autocast costs on this machine's CPU beside fp32: a product of matrices, a small encoder's training step.

    OMP_NUM_THREADS=1 python benchmarks/bf16.py

Interleaved in one process, the encoder random, of MiniLM-L6's shape, frozen but for LoReFT on all tokens of all layers.
Prints medians (range) in ms and their ratio as Markdown.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from peft import get_peft_model

from reftune import ReftConfig


def product() -> Callable[[], object]:
    """1,024 tokens through one layer, 384 wide, to 1,536."""
    x, w = torch.randn(1024, 384), torch.randn(1536, 384)
    return lambda: torch.nn.functional.linear(x, w)


def training_step(rows: int, length: int) -> Callable[[], object]:
    """Forward and backward of `rows` rows of `length` tokens."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    base = transformers.BertForSequenceClassification(config)
    model = get_peft_model(base, ReftConfig(task_type="SEQ_CLS", r=4, layers="all", positions="all")).train()
    ids = torch.randint(5, 30000, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(rows, dtype=torch.long)}
    return lambda: model(**batch).loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=48)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    works = {
        "linear 384 to 1,536, 1,024 tokens": product(),
        f"training step, {arguments.rows} rows of {arguments.length} tokens": training_step(
            arguments.rows, arguments.length
        ),
    }
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {torch.get_num_threads()} threads, {arguments.rounds} rounds\n")
    print("| | fp32 | bf16 | ratio |\n|---|---|---|---|")
    for name, work in works.items():
        spent: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(arguments.rounds + 1):  # the first warms up
            for bf16, times in spent.items():
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    start = time.perf_counter()
                    work()
                    if turn:
                        times.append(1000 * (time.perf_counter() - start))
        fp32, half = (statistics.median(spent[bf16]) for bf16 in (False, True))
        cells = [f"{statistics.median(t):.1f} ({min(t):.1f}–{max(t):.1f})" for t in spent.values()]
        print(f"| {name} | {cells[0]} | {cells[1]} | {half / fp32:.1f} |", flush=True)


if __name__ == "__main__":
    main()
