"""The forward passes, without a graph and without edits, whose results are kept.

    heads, states = Frozen(base, blocks).compute(rows, depth)

A head is read through the whole model once; a window through the first `depth` blocks, on the head's cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ...tuner.caches import cache_name
from ...tuner.session import Session
from .attention import attention_configs
from .logits import only_rows
from .prefix import unpack
from .states import output_of, skip_blocks
from .window import Row


class Frozen:
    """The base of a model with ReFT, run as if it had no adapter.

    autocast: makes the context that the training pass runs in.
    """

    def __init__(self, base: Any, session: Session, blocks: Sequence[Any], autocast: Any = nullcontext) -> None:
        self.base, self.session, self.blocks, self.autocast = base, session, blocks, autocast
        self.attention = attention_configs(base)
        self._as_tuple: bool | None = None

    @torch.no_grad()
    def compute(
        self, rows: Sequence[Row], depth: int, heads: bool = True, states: bool = True
    ) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Keys and values of the rows' heads from layer `depth` on, and what block `depth - 1` hands out for their
        windows (n, d); on the model's device. What is not asked for, or is empty, is an empty list.
        """
        states = states and depth > 0
        as_tuple = self.as_tuple
        device = self.base.get_input_embeddings().weight.device
        cache, past = None, max(row.start for row in rows)
        kept: list[dict[str, Tensor]] = []
        with self._bare(device):
            if past and (heads or states):
                cache = DynamicCache()
                with nullcontext() if heads else skip_blocks(self.blocks[depth:], as_tuple=as_tuple):
                    self._run([row.head for row in rows], [0] * len(rows), "left", cache, device)
                if heads:
                    kept = unpack(cache, [row.start for row in rows], len(self.blocks), depth)
            if not states:
                return kept, []
            # nobody needs what the blocks above would make of a window
            above = skip_blocks(self.blocks[depth:], as_tuple=as_tuple)
            with output_of(self.blocks[depth - 1]) as found, above:
                windows = [row.ids[row.start : row.end] for row in rows]
                self._run(windows, [row.start for row in rows], "right", cache, device)
        ((hidden, _),) = found
        return kept, [hidden[i, : row.end - row.start].clone() for i, row in enumerate(rows)]

    @property
    def as_tuple(self) -> bool:
        """Whether the blocks return tuples; told by one pass over one token."""
        if self._as_tuple is None:
            device = self.base.get_input_embeddings().weight.device
            with torch.no_grad(), self._bare(device), output_of(self.blocks[0]) as found:
                self._run([torch.zeros(1, dtype=torch.long, device=device)], [0], "right", None, device)
            self._as_tuple = found[0][1]
        return self._as_tuple

    def _run(self, texts: list[Tensor], starts: list[int], side: str, cache: Any, device: torch.device) -> None:
        past, width = max(starts), max(len(text) for text in texts)
        made: Any = {"dtype": torch.long, "device": texts[0].device}
        ids = torch.zeros(len(texts), width, **made)
        mask = torch.zeros(len(texts), past + width, **made)
        places = torch.zeros(len(texts), width, **made)
        for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
            first = width - len(text) if side == "left" else 0
            ids[row, first : first + len(text)] = text
            places[row, first : first + len(text)] = start + torch.arange(len(text), **made)
            mask[row, past - start : past] = 1
            mask[row, past + first : past + first + len(text)] = 1
        call: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if takes(self.base, "position_ids"):
            call["position_ids"] = places
        call = {name: tensor.to(device) for name, tensor in call.items()}
        if cache is not None:
            call |= {str(cache_name(self.base)): cache, "use_cache": True}
        self.base(**call)

    @contextmanager
    def _bare(self, device: torch.device) -> Iterator[None]:
        """No edits, one row of logits, and the precision of training."""
        before, self.session.enabled = self.session.enabled, False
        one = torch.zeros(1, dtype=torch.long, device=device)
        try:
            with only_rows(self.base.get_output_embeddings(), one), self.autocast():
                yield
        finally:
            self.session.enabled = before


def takes(base: Any, argument: str) -> bool:
    """Whether the model's forward names the argument."""
    import inspect

    return argument in inspect.signature(type(base).forward).parameters
