"""Scores on the selection rows, which a report leaves out: each method's mean over seeds, by task and over all.

python benchmarks/selection_scores.py docs/benchmarks/glue-outputs

Last: the mean test score of the methods' best on each task by these scores, as if it had been chosen by them.
"""

import sys
from collections import defaultdict
from statistics import mean

from reftune.bench.store import read_rows
from reftune.bench.tasks import task


def main(source: str) -> None:
    """Print them, in percent."""
    chosen, tested = defaultdict(list), defaultdict(list)
    for row in read_rows(source):
        if row["stage"] == "final" and "score" in row["selection"]:
            key = row["task"], row["method"]
            chosen[key].append(100 * row["selection"]["score"])
            tested[key].append(100 * row["metrics"][row["task"]][task(row["task"]).metrics[0].name])
    tasks, methods = (list(dict.fromkeys(key[i] for key in chosen)) for i in (0, 1))
    for method in methods:
        scores = [mean(chosen[name, method]) for name in tasks]
        each = ", ".join(f"{name} {score:.1f}" for name, score in zip(tasks, scores, strict=True))
        print(f"{method}: {each}; mean {mean(scores):.1f}")
    reft = [method for method in methods if not method.startswith("lora")]
    best = [max(reft, key=lambda method: mean(chosen[name, method])) for name in tasks]
    print(
        f"the best of {', '.join(reft)} on each, on the test rows: "
        f"{mean(mean(tested[pair]) for pair in zip(tasks, best, strict=True)):.1f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
