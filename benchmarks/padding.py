"""How many tokens a row of GLUE takes in a batch of 16: as written, padded in random batches, padded by length.

python benchmarks/padding.py DIR        (DIR: the data folder of `reftune bench`; MiniLM's tokenizer, 2,400 rows a task)
"""

import sys

from reftune.bench.classify import encode
from reftune.bench.data import load_rows, split
from reftune.bench.models import load_classifier
from reftune.bench.order import ByLength
from reftune.bench.tasks import PairTask, task

BATCH, LONGEST = 16, 96


def padded(lengths: list[int]) -> float:
    """Tokens a row when every `BATCH` of these rows are padded to their longest."""
    batches = [lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
    return sum(max(batch) * len(batch) for batch in batches) / len(lengths)


def main(folder: str) -> None:
    """Print the table."""
    _, tokenizer = load_classifier("minilm-l6", 2, 0, None, None)
    print("| task | as written | random | by length | ratio |\n|---|---|---|---|---|")
    for name in ("stsb", "sst2", "mrpc", "qnli", "rte", "cola"):
        found = task(name)
        assert isinstance(found, PairTask)
        rows = split(found, load_rows(found, folder), seed=0, train=2400, select=1, test=1).train
        lengths = [len(row["input_ids"]) for row in encode(rows, found, tokenizer, LONGEST)]
        together = padded([lengths[i] for i in ByLength(lengths, BATCH, seed=0)])
        written, apart = sum(lengths) / len(lengths), padded(lengths)
        print(f"| {name} | {written:.1f} | {apart:.1f} | {together:.1f} | {apart / together:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1])
