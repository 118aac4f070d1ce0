"""Kinds outside the ReFT paper: RED, ReFT-r1 and the post-block SiLU edit."""

import math

import torch
from torch import Tensor, nn

from .base import Intervention, in_precision_of, register_intervention
from .rows import LowRankIntervention


@register_intervention("red")
class RedIntervention(Intervention):
    """RED, s⊙h + b (Wu et al. 2024, arXiv 2402.15179). 2d numbers; the paper edits `mlp_output` of every layer at
    every position (`layers="all", component="mlp_output", positions="all"`). Starts at s = 1, b = 0, there too."""

    has_rank = False
    s: nn.Parameter

    def reset_parameters(self) -> None:
        if self._activation is not None:
            raise ValueError(f"RED is s⊙h + b: act_fn={self.act_fn!r} has no place in it.")
        self.s = nn.Parameter(torch.ones(self.embed_dim))
        self._register_bias(torch.zeros(self.embed_dim))

    def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
        s, b = in_precision_of(h, self.s, self.b)
        edit: Tensor = (s - 1) * h
        return edit if b is None else edit + b


@register_intervention("reft_r1")
class ReftR1Intervention(LowRankIntervention):
    """ReFT-r1 of AxBench (Wu et al. 2025, arXiv 2501.17148, eq. 5): h + mean(top-k ReLU(h·w)) w, ‖w‖ = 1.

    One direction w that both detects a concept in a prompt and steers by it; the mean is over the k strongest edited
    tokens of the prompt (`intervention_kwargs={"topk": k}`, 8 as in AxBench, fewer where the prompt is shorter). Each
    edited token therefore depends on the prompt's others; a generated token stands alone. w is random at the start:
    the edit is quadratic in w, so w = 0 would never learn. d numbers; the rank is 1.
    """

    has_rank = False
    orthonormal = True
    couples_positions = True
    setting_names = ("topk",)

    def reset_parameters(self) -> None:
        self.topk = int(self.settings.get("topk", 8))
        if self.topk < 1:
            raise ValueError(f"topk must be at least 1, but is {self.topk}.")
        if self._activation is not None:
            raise ValueError(f"ReFT-r1 has its own ReLU: act_fn={self.act_fn!r} has no place in it.")
        self.low_rank_dimension = 1
        self._make_rows()

    def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
        rows = self.rows().to(h.dtype)
        latent = torch.relu(nn.functional.linear(h, rows)).squeeze(-1)
        if segments is None:  # h (..., n, d): the tokens of one prompt lie along the second last dimension
            tokens = latent if latent.dim() else latent.unsqueeze(0)  # h (d,): a prompt of one token
            strength = tokens.topk(min(self.topk, tokens.shape[-1]), dim=-1).values.mean(-1, keepdim=True)
            return strength.expand_as(tokens).reshape(latent.shape).unsqueeze(-1) * rows.view(-1)
        return _topk_mean(latent, segments, self.topk).unsqueeze(-1) * rows.view(-1)

    def directions(self) -> tuple[Tensor, Tensor]:
        rows = self.rows().detach()
        return rows, rows


def _topk_mean(latent: Tensor, segments: Tensor, k: int) -> Tensor:
    """Mean of the k largest latents of each segment, handed back to its rows: (N,), (N,) → (N,)."""
    _, group, count = torch.unique(segments, return_inverse=True, return_counts=True)
    # rank of every row within its segment, by latent, descending
    order = torch.argsort(latent.detach(), descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    start = count.cumsum(0) - count
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - start[group[order]]
    kept = torch.where(rank < k, latent, torch.zeros_like(latent))
    total = torch.zeros(len(count), dtype=latent.dtype, device=latent.device).index_add(0, group, kept)
    return (total / count.clamp(max=k).to(latent.dtype))[group]


@register_intervention("postblock")
class PostBlockIntervention(Intervention):
    """Post-block edit, h + W_up SiLU(W_down h) (arXiv 2603.00425): all layers, all tokens, generated ones too
    (`layers="all", positions="all"`). W_up = 0 at the start, so Δ = 0. 2rd numbers; both matrices are stored r×d."""

    W_down: nn.Parameter
    W_up: nn.Parameter

    def reset_parameters(self) -> None:
        if self._activation is not None and self.act_fn != "silu":
            raise ValueError(f"The post-block edit's function is SiLU: act_fn={self.act_fn!r} has no place in it.")
        assert self.low_rank_dimension is not None
        bound = 1 / math.sqrt(self.embed_dim)
        shape = self.low_rank_dimension, self.embed_dim
        self.W_down = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        up = torch.zeros(shape) if self.init_weights else torch.empty(shape).uniform_(-bound, bound)
        self.W_up = nn.Parameter(up)

    def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
        down, up = in_precision_of(h, self.W_down, self.W_up)
        return nn.functional.silu(nn.functional.linear(h, down)) @ up

    def directions(self) -> tuple[Tensor, Tensor]:
        return self.W_up.detach(), self.W_down.detach()
