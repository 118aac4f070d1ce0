"""What an adapter adds to the work of its base, in floating-point operations: counted by torch, beside the closed form.

    print(cost(model, prompt=128, new=256))        # a PeftModel with a ReFT adapter, on any device, "meta" included

The base is counted over a whole pass; the edits by running each intervention on as many rows as it edits. A low-rank
edit Rᵀ((W − R)h + b) of one token takes 4rd operations: two matrix products of r rows of width d.
"""

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from .interventions import Intervention
from .positions import layout, parse, select_group
from .tuner.counting import own_numbers


@dataclass(frozen=True)
class Cost:
    """Operations for one sequence: a prompt of `prompt` tokens and `new` generated ones."""

    prompt: int
    new: int
    base: int  # by the base
    edits: int  # by the adapter, counted
    formula: int  # by the adapter, 4rd for each edited token and intervention
    edited: int  # tokens edited, over all interventions
    parameters: int
    base_parameters: int

    @property
    def share_of_a_token(self) -> float:
        """What the edits of one token at one site add, as a share of the base's operations for a token."""
        return self.edits / max(self.edited, 1) / (self.base / (self.prompt + self.new))

    @property
    def share(self) -> float:
        """What the adapter adds, as a share of the base's operations."""
        return self.edits / self.base

    def __str__(self) -> str:
        tokens = self.prompt + self.new
        return "\n".join(
            [
                f"{self.prompt} prompt tokens and {self.new} new ones, one sequence",
                f"base     {self.base:.4e} operations, {self.base / tokens:.3e} a token, "
                f"{self.base_parameters:,} parameters",
                f"adapter  {self.edits:.4e} counted by torch, {self.formula:.4e} by the closed form 4rd a token "
                f"and site ({self.edited:,} edits), {self.parameters:,} parameters",
                f"added    {self.share:.6%} in all, {self.share_of_a_token:.5%} of a token for each of its edits",
            ]
        )


def cost(model: Any, prompt: int = 128, new: int = 256) -> Cost:
    """Count what a generation with a cache takes with this model's active adapters; weights are not looked at.

    Args:
        model: a PeftModel with ReFT adapters, of a causal language model.
        prompt, new: tokens of the prompt, and generated after it.

    Raises ValueError for a prompt without tokens.
    """
    if prompt < 1 or new < 0:
        raise ValueError(f"prompt must be at least 1 and new at least 0, but they are {prompt} and {new}.")
    base = model.get_base_model()
    edits = formula = edited = parameters = 0
    ones = torch.ones(1, prompt + new, dtype=torch.bool, device="cpu")
    places = layout(ones, torch.arange(prompt + new, device="cpu").expand_as(ones) >= prompt)
    session = model.base_model.session
    for layer in session.layers:
        for name in session.names:
            for (positions, group), module in zip(layer.groups.get(name, ()), layer.interventions(name), strict=True):
                rows = int(select_group(parse(group), places, parse(positions)).sum())
                edits += rows * _operations(module)
                formula += rows * 4 * (module.low_rank_dimension or 0) * module.embed_dim
                edited += rows
                parameters += own_numbers([module])
    with model.disable_adapter(), torch.no_grad():
        whole = _count(base, prompt + new)  # with a cache each token is computed once, as in one causal pass
    own = {id(p) for names in session.interventions.values() for module in names for p in module.parameters()}
    weights = sum(p.numel() for p in base.parameters() if id(p) not in own)
    return Cost(prompt, new, whole, edits, formula, edited, parameters, weights)


def _count(base: Any, tokens: int) -> int:
    """Operations of the base over a sequence, counted on the meta device from its config: no weight is touched."""
    with torch.device("meta"):
        empty = type(base)(base.config).eval()
        ids = torch.zeros(1, tokens, dtype=torch.long)
        # taken as it is: transformers looks into others, and meta has no values
        mask = torch.zeros(1, 1, tokens, tokens)
    with _no_autocast_on_meta(), FlopCounterMode(display=False) as counter:
        empty(input_ids=ids, attention_mask=mask, use_cache=False)
    return int(counter.get_total_flops())


def _no_autocast_on_meta() -> AbstractContextManager[Any]:
    """transformers 5.0 asks whether autocast is on for the meta device, which torch does not answer: it is not."""
    original = torch.is_autocast_enabled
    return patch.object(torch, "is_autocast_enabled", lambda *args: args != ("meta",) and original(*args))


def _operations(module: Intervention) -> int:
    """Operations of one edited token, counted on a copy, with weights of its own if the module is on the meta device (a
    matrix product counts 2mnk)."""
    fresh = copy.deepcopy(module).eval()
    bare = any(value.is_meta for value in fresh.state_dict().values())
    fresh = fresh.to_empty(device="cpu") if bare else fresh.to("cpu")
    rows = torch.zeros(2, module.embed_dim, device="cpu")
    with torch.no_grad():
        for value in fresh.state_dict().values() if bare else ():
            value.normal_()
        fresh(rows)  # puts its rows right, which is done once
        with FlopCounterMode(display=False) as counter:
            fresh(rows)
    return int(counter.get_total_flops()) // 2
