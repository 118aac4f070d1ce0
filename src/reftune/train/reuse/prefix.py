"""Keys and values of the heads: put into the cache that the model reads, each row where its head ends.

    cache = head_cache(entries, starts, layers, skip, device)
    model(input_ids=window, past_key_values=cache, ...)

An entry holds one example without padding: `{"k4 v4 k5 v5": (4, H, P, D)}`, tensors of one shape stacked, named by
what they are and the layer. A pass over the window concatenates, layer by layer, and keeps nothing in the cache.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .window import NotReusableError

Entry = Mapping[str, Tensor]


def unpack(cache: Any, rows: Sequence[int], layers: int, skip: int) -> list[dict[str, Tensor]]:
    """The entries of the rows, with heads of `rows[i]` tokens that end in the cache's last column.

    skip: layers whose keys and values are not wanted. Raises NotReusableError if the cache is made of anything else.
    """
    if not isinstance(cache, DynamicCache) or len(cache.layers) != layers:
        raise NotReusableError("its cache does not hold keys and values of every layer")
    for layer in cache.layers:
        keys: Any = getattr(layer, "keys", None)
        values: Any = getattr(layer, "values", None)
        known = type(layer) is DynamicLayer and keys is not None and values is not None
        if not known or keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] != max(rows):
            raise NotReusableError("its cache does not hold one key and one value for every token in every layer")
    entries = []
    for row, count in enumerate(rows):
        groups: dict[Any, dict[str, Tensor]] = {}
        for number in range(skip, layers):
            for letter, states in (("k", cache.layers[number].keys), ("v", cache.layers[number].values)):
                own = states[row, :, states.shape[2] - count :]
                groups.setdefault((own.shape, own.dtype), {})[f"{letter}{number}"] = own
        entries.append({" ".join(group): torch.stack(list(group.values())) for group in groups.values()})
    return entries


class Behind(torch.autograd.Function):
    """(B, H, n, D) new tokens behind the heads, laid out with their ends in column `length`: (B, H, length + n, D).

    `torch.cat` would need the heads laid out first, and so copy them twice.
    """

    @staticmethod
    def forward(ctx: Any, new: Tensor, pieces: Sequence[Tensor], length: int) -> Tensor:
        ctx.length = length
        out = new.new_empty(new.shape[0], new.shape[1], length + new.shape[2], new.shape[3])
        for row, piece in enumerate(pieces):
            first = length - piece.shape[1]
            out[row, :, :first] = 0  # it is masked, but zero times garbage may be NaN
            out[row, :, first:length] = piece
        out[:, :, length:] = new
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0][:, :, ctx.length :], None, None


class HeadLayer(DynamicLayer):
    """One layer's keys and values of the heads, laid out when they are asked for: pieces are (H, P, D), P ≤ length."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], length: int) -> None:
        super().__init__()
        self.pieces, self.length = (keys, values), length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, H, length + n, D): the heads before the n new tokens; a gradient flows through the new ones alone."""
        keys, values = self.pieces
        return Behind.apply(key_states, keys, self.length), Behind.apply(value_states, values, self.length)

    def get_seq_length(self, *args: Any) -> int:
        return self.length

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        count = query if isinstance(query, int) else query.shape[0]  # early 5.x pass the places of the queries
        return self.length + count, 0


class LaidOutLayer(HeadLayer):
    """The same, of heads that lie in their columns already: (B, H, length, D)."""

    def __init__(self, heads: tuple[Tensor, Tensor]) -> None:
        super().__init__([], [], heads[0].shape[2])
        self.heads = heads

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (
            torch.cat([head.to(new), new], dim=2)
            for head, new in zip(self.heads, (key_states, value_states), strict=True)
        )
        return keys, values


def head_cache(entries: Sequence[Entry], starts: Sequence[int], layers: int) -> Any:
    """A cache that holds the heads of a batch; layers that no entry holds only know how long they are."""
    length = max(starts)
    index: dict[str, tuple[str, int]] = {}
    first = next((entry for entry, start in zip(entries, starts, strict=True) if start), {})
    for group in first:
        index |= {name: (group, place) for place, name in enumerate(group.split())}
    if any(_starts_slowly(tensor.device) for tensor in first.values()):
        return _laid_out(entries, starts, layers, index)

    def pieces(name: str) -> list[Tensor]:
        if name not in index:
            return []
        group, place = index[name]
        # a row without a head has no entry, and a piece of no tokens
        some = next(entry for entry, start in zip(entries, starts, strict=True) if start)[group][place]
        none = some[:, :0]
        return [entry[group][place] if start else none for entry, start in zip(entries, starts, strict=True)]

    cache = DynamicCache()
    cache.layers = [HeadLayer(pieces(f"k{n}"), pieces(f"v{n}"), length) for n in range(layers)]
    return cache


def _starts_slowly(device: torch.device) -> bool:
    return device.type != "cpu"


def _laid_out(
    entries: Sequence[Entry], starts: Sequence[int], layers: int, index: Mapping[str, tuple[str, int]]
) -> Any:
    """`head_cache` in one copy a row, where a copy a row and layer costs more to start than to do."""
    length, groups = max(starts), dict[str, Tensor]()
    for row, entry in enumerate(entries):
        for group, tensor in entry.items() if starts[row] else ():
            count, heads, tokens, width = tensor.shape
            if group not in groups:
                groups[group] = tensor.new_zeros(count, len(entries), heads, length, width)
            groups[group][:, row, :, length - tokens :] = tensor

    def layer(number: int) -> HeadLayer:
        if f"k{number}" not in index:
            return HeadLayer([], [], length)
        keys, values = (groups[group][place] for group, place in (index[f"k{number}"], index[f"v{number}"]))
        return LaidOutLayer((keys, values))

    cache = DynamicCache()
    cache.layers = [layer(number) for number in range(layers)]
    return cache
