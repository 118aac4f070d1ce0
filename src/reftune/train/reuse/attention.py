"""Attention of a short window over long heads, without a copy of the heads for every group of queries.

With grouped queries, one key head serves G query heads. transformers repeats keys and values G times where there is a
mask; for a window of n tokens behind heads of P it is the other way round cheaper: the G heads' queries are laid one
behind the other, (B, H/G, G·n, D), and the keys stay as they are. The numbers are the same.

    configs = attention_configs(base)
    with packed(configs): model(...)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "reftune_packed"


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, with the queries of a group packed where that changes nothing else.

    query (B, H, n, D), key and value (B, H/G, P + n, D), attention_mask (B, 1, n, P + n); returns (B, n, H, D).
    """
    groups = query.shape[1] // key.shape[1]
    plain = kwargs.keys() <= _KNOWN or all(kwargs[name] is None for name in kwargs.keys() - _KNOWN)
    if groups == 1 or attention_mask is None or attention_mask.shape[1] != 1 or not plain:
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    rows, heads, tokens, width = query.shape
    mask = attention_mask[..., : key.shape[2]].expand(-1, -1, tokens, -1).repeat(1, 1, groups, 1)
    edited = nn.functional.scaled_dot_product_attention(
        query.reshape(rows, heads // groups, groups * tokens, width),
        key,
        value,
        attn_mask=mask,
        dropout_p=kwargs.get("dropout") or 0.0,
        scale=kwargs.get("scaling"),
    )
    return edited.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


# What models pass that a mask leaves without meaning here; anything else that is set goes to transformers' own.
_KNOWN = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache", "cache_position"}
AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_configs(base: nn.Module) -> list[Any]:
    """The configs of the base that ask for sdpa attention, each once."""
    configs = {
        id(config): config for module in base.modules() if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in configs.values() if getattr(config, "_attn_implementation", None) == "sdpa"]


@contextmanager
def packed(configs: Sequence[Any]) -> Iterator[None]:
    """Let these configs' modules attend by `packed_attention` in here."""
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = "sdpa"
