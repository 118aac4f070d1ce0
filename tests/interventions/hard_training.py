"""Shared by the tests of R: modules whose edit is not zero, and training that is hard on R."""

from collections.abc import Callable

import torch
from torch import Tensor

from reftune.interventions import INTERVENTIONS, Intervention

KINDS = ["loreft", "consreft", "lobireft", "direft", "reft_r1"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.5, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.5, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.5, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.1),
}


def build(kind: str = "loreft", d: int = 24, r: int = 4, **settings: object) -> Intervention:
    return INTERVENTIONS[kind](d, r, init_weights=False, **settings)


def train(
    module: Intervention, optimizer: torch.optim.Optimizer, steps: int, dtype: torch.dtype = torch.float32
) -> None:
    module.train()
    target = torch.randn(16, module.embed_dim)
    for _ in range(steps):
        h = torch.randn(16, module.embed_dim).to(dtype)
        optimizer.zero_grad()
        (module(h).float() - target).pow(2).mean().backward()
        optimizer.step()


def edit_space(module: Intervention) -> Tensor:
    """The rows that the module really computes with, learning in training and not in eval."""
    with torch.set_grad_enabled(module.training):
        return module.rows().detach()
