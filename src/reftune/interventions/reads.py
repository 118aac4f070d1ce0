"""Where an edit should read: the directions in which h moves together with the loss's gradient, from a few batches.

With g = ∂loss/∂(edited h) at the tokens an edit reaches, μ the mean of h there, and R = 0:

    M = Σ g (h − μ)ᵀ = L S Vᵀ           the loss's gradient in RᵀW, for an edit that reads h without its mean
    W = the first r rows of Vᵀ, scaled; b = −Wμ

As LoRA-GA does for LoRA (arXiv 2407.05000), but R stays 0, so that Δ = 0, and what is read is centred.
Tokens that lie 10 times farther off than most say nothing: a language model's first token may be 100 times as large as
all others, and would be all that is read. An edit without b takes μ = 0.

Nothing d×d is held: two passes over the batches find the main right singular vectors of M by a random sketch of
k = 4r + 28 columns (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.1 for Mᵀ).
"""

import math

import torch
from torch import Tensor

from .complement import without

_STILL = 1e-6  # of the spread of a random row, and of the first singular value: less is rounding
_FAR = 10.0  # times the median distance


class Reads:
    """The sums of one site. First `add` all batches, then `turn`, then `add` the same again, then `start`.

    Args:
        w: (r, d), rows that read at random; what they read on average sets the scale of the new ones.
        centred: whether the edit has a b to take the mean away with.
        beside: (k, d), orthonormal rows out of which W must keep, or None.
    """

    def __init__(self, w: Tensor, centred: bool = True, beside: Tensor | None = None) -> None:
        self.w, self.centred = w.detach().float(), centred
        self.beside = None if beside is None else beside.detach().float()
        rank, width = w.shape
        columns = torch.randn(width, min(width, 4 * rank + 28), generator=torch.Generator("cpu").manual_seed(0))
        self.columns = columns.to(self.w.device)  # (d, k), of g; after `turn` orthonormal ones, of h
        self.turned = False
        self.scale = 0.0
        self.middle: Tensor = self.w.new_zeros(width)  # amid the first batch
        self.far = 0.0  # the distance from there beyond which a token is left out
        self.shift: Tensor | None = None  # taken away from h: what is summed is small then, and fp32 will do
        self._zero()

    def _zero(self) -> None:
        width, columns = self.columns.shape
        self.count, self.read = 0, 0.0
        self.h, self.g = self.w.new_zeros(width), self.w.new_zeros(width)
        self.product, self.square = self.w.new_zeros(width, columns), self.w.new_zeros(columns, columns)

    @torch.no_grad()
    def add(self, h: Tensor, g: Tensor) -> None:
        """The states h (N, d) that an edit saw, and the gradient g (N, d) of the loss at what it gave out."""
        h, g = h.detach().float(), g.detach().float()
        if self.shift is None:
            self.middle = h.contiguous().median(0).values  # of an expanded tensor torch finds a wrong one
            self.far = _FAR * float((h - self.middle).norm(dim=1).median()) or math.inf
            self.shift = self.middle if self.centred else torch.zeros_like(self.middle)
        near = (h - self.middle).norm(dim=1) <= self.far
        h, g = h[near], g[near]
        off = h - self.shift
        if self.beside is not None:
            off = without(off, self.beside)
        self.count += len(h)
        self.h += off.sum(0)
        self.g += g.sum(0)
        if self.turned:
            seen = off @ self.columns
            self.product += g.mT @ seen
            self.square += seen.mT @ seen
        else:
            self.product += off.mT @ (g @ self.columns)
            self.read += float((h @ self.w.mT).square().mean(1).sum())

    @torch.no_grad()
    def turn(self) -> None:
        """The end of the first pass: the columns become a basis of where h goes with g."""
        self.scale = self.read / max(self.count, 1)
        self.columns, _ = torch.linalg.qr(self._product(self.h, self.g))
        self.turned = True
        self._zero()

    @torch.no_grad()
    def start(self) -> tuple[Tensor, Tensor]:
        """W (r, d) and μ (d,), fp32. Over the tokens each row of W(h − μ) has as large a root mean square as a random
        row's Wh. Where h does not move, or not with g, a row is the random one."""
        rank = len(self.w)
        if self.count == 0 or self.shift is None:
            return self.w.clone(), self.w.new_zeros(self.w.shape[1])
        mean = self.h / self.count if self.centred else torch.zeros_like(self.h)
        seen = mean @ self.columns
        _, size, right = torch.linalg.svd(self._product(self.g, self.h), full_matrices=False)
        chosen = right[:rank]  # (r, k), in the basis
        covariance = self.square / self.count - torch.outer(seen, seen)
        spread = torch.einsum("rk,kl,rl->r", chosen, covariance, chosen)
        moves = (spread > _STILL * self.scale) & (size[:rank] > _STILL * size[0])
        new = (chosen * (self.scale / spread.clamp(min=1e-30)).sqrt()[:, None]) @ self.columns.mT
        w = self.w.clone()
        w[: len(new)] = torch.where(moves[:, None], new, w[: len(new)])
        return w, mean + self.shift

    def _product(self, rows: Tensor, seen: Tensor) -> Tensor:
        """The product without what the means give it: Σ a (b − b̄)ᵀ = Σ a bᵀ − (Σ a)(Σ b)ᵀ / n, b by its columns."""
        if not self.centred:
            return self.product
        return self.product - torch.outer(rows, seen @ self.columns) / max(self.count, 1)
