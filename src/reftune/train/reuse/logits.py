"""Logits at the tokens that predict a label only: the head of the model is given those rows and no others.

A pre-hook on the output embeddings does it, so that whatever the model does after its head (scaling, soft-capping) and
before it stays its own. The rows are handed over as one contiguous (1, N, d): a sliced (B, n, d) view takes a batched
matrix product that is five times slower on a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def only_rows(head: nn.Module, rows: Tensor) -> Iterator[None]:
    """While it is open, `head` sees (1, N, d) instead of (B, L, d): the flattened rows `rows` (N,)."""

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows.to(hidden.device))
        return (chosen.unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
