"""What keeping R Rᵀ = I costs a training step: 30 layers, the edit of 16 rows each, forward and backward.

    python benchmarks/orthonormal.py                       # or --device cuda

Ways, interleaved in one process: `unconstrained` (no constraint), `reftune` (all R pulled back in place by one batched
Cholesky factorisation, its gradient in closed form), `qr` (the same by one batched QR), `qr in the graph` (torch's QR
of the stacked R and its backward). AdamW moves R before every step, so that there is always something to pull back.
Prints medians and quartiles in ms as Markdown; synchronised wall time.
"""

import argparse
import platform
import statistics
import time

import torch

from reftune.interventions import NoreftIntervention, orthonormal_rows, retract_
from reftune.interventions.orthogonal import rows_at_manifold

LAYERS, ROWS = 30, 16


def wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def make_step(way: str, d: int, r: int, device: str):
    """A function that runs one training step of the given way."""
    torch.manual_seed(0)
    modules = [NoreftIntervention(d, r).to(device) for _ in range(LAYERS)]
    parameters = [p for m in modules for p in m.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, foreach=True)
    hidden = torch.randn(LAYERS, ROWS, d, device=device)

    def step() -> float:
        with torch.no_grad():  # what the optimiser does to R, outside the clock
            for module in modules:
                module.R.add_(torch.randn_like(module.R), alpha=1e-3)
        wait(device)
        start = time.perf_counter()
        if way == "reftune":
            retract_([m.R for m in modules])
            rows = [rows_at_manifold(m.R) for m in modules]
        elif way == "qr":
            with torch.no_grad():
                for module, own in zip(modules, orthonormal_rows(torch.stack([m.R for m in modules])), strict=True):
                    module.R.copy_(own)
            rows = [rows_at_manifold(m.R) for m in modules]
        elif way == "qr in the graph":
            rows = list(orthonormal_rows(torch.stack([m.R for m in modules])))
        else:
            rows = [m.R for m in modules]
        loss = torch.zeros((), device=device)
        for h, module, q in zip(hidden, modules, rows, strict=True):
            loss = loss + (torch.nn.functional.linear(h, module.W - q, module.b) @ q).square().mean()
        loss.backward()
        wait(device)
        spent = time.perf_counter() - start
        optimiser.step()
        optimiser.zero_grad()
        return spent * 1000

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = arguments.device
    where = (
        f"{torch.get_num_threads()} threads, {platform.machine()}" if device == "cpu" else torch.cuda.get_device_name()
    )
    print(f"torch {torch.__version__}, {where}, {arguments.steps} steps")
    print("\n| | " + " | ".join(ways := ["unconstrained", "reftune", "qr", "qr in the graph"]) + " |")
    print("|---|" + "---|" * len(ways))
    for d, r in ((576, 4), (576, 8), (4096, 4), (4096, 8)):
        steps = {way: make_step(way, d, r, device) for way in ways}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(arguments.steps + 3):
            for way in ways:
                spent = steps[way]()
                if i >= 3:
                    times[way].append(spent)
        cells = []
        for way in ways:
            low, _, high = statistics.quantiles(times[way], n=4)
            cells.append(f"{statistics.median(times[way]):.2f} ({low:.2f}–{high:.2f})")
        print(f"| d={d}, r={r} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
