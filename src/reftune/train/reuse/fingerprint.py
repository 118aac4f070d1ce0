"""What a kept state depends on, as a fingerprint: base weights, configuration, precision, versions, layout.

`weights_digest` reads every base weight, on its device; `versions` only notices that one may have changed.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from ...tuner.layer import ReftLayer

LAYOUT = 1  # raise it when entries or keys change their meaning
_CHUNK = 1 << 20
_STEP = 0x1E3779B97F4A7C16  # even, so that 1 + n * _STEP is odd: no change of one word cancels modulo 2⁶⁴


def fingerprint(base: Any, autocast: torch.dtype | None) -> dict[str, str]:
    """Parts of the fingerprint, by name. Raises TypeError or RuntimeError where weights cannot be read."""
    import transformers

    config = {k: v for k, v in base.config.to_dict().items() if k not in _IRRELEVANT}
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "base weights": weights_digest(base),
        "configuration": hashlib.sha256(text.encode()).hexdigest(),
        "attention": str(getattr(base.config, "_attn_implementation", None)),
        "precision": f"{getattr(base, 'dtype', None)}, autocast {autocast}",
        "device": next(base.parameters()).device.type,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "layout": str(LAYOUT),
    }


_IRRELEVANT = ("_name_or_path", "use_cache", "transformers_version", "torch_dtype", "dtype", "architectures")


def own_tensors(base: nn.Module) -> list[tuple[str, Tensor]]:
    """The base's parameters and buffers, those of the adapters left out."""
    skip = tuple(name + "." for name, module in base.named_modules() if isinstance(module, ReftLayer))
    found = [*base.named_parameters(), *base.named_buffers()]
    return [(name, tensor) for name, tensor in found if not name.startswith(skip)]


def holders(base: nn.Module) -> list[Any]:
    """Where the base's tensors are held, for `versions`; to be asked for again when modules may have changed."""
    own = {id(m) for layer in base.modules() if isinstance(layer, ReftLayer) for m in layer.modules()}
    found = [m for m in base.modules() if id(m) not in own]
    return [held for m in found for held in (m._parameters, m._buffers) if held]


def versions(held: list[Any]) -> tuple[tuple[int, int], ...]:
    """Changes whenever a base tensor is replaced or written in place (not through `.data`); costs microseconds."""
    tensors = [tensor for values in held for tensor in values.values() if tensor is not None]
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def weights_digest(base: nn.Module) -> str:
    """A hash of every base tensor: any one changed number changes it."""
    whole = hashlib.sha256()
    for name, tensor in own_tensors(base):
        if tensor.is_meta:
            raise TypeError(f"{name} is not in memory (offloaded)")
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_words(tensor)}\n".encode())
    return whole.hexdigest()


@torch.no_grad()
def _words(tensor: Tensor) -> int:
    """A sum of the tensor's bytes, eight at a time, each times an odd number of its own, modulo 2⁶⁴."""
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    if raw.numel() % 8 or raw.storage_offset() % 8:
        raw = nn.functional.pad(raw, (0, -raw.numel() % 8)).clone()
    words = raw.view(torch.int64)
    total = tensor.numel()
    for first in range(0, words.numel(), _CHUNK):
        part = words[first : first + _CHUNK]
        odd = torch.arange(first, first + part.numel(), device=part.device).mul_(_STEP).add_(1)
        total = (total * 1_000_003 + int((part * odd).sum())) % (1 << 64)
    return total


def entry_key(kind: str, skip: int, *parts: Tensor) -> str:
    """The name of an entry: what it is, from which layer, and the tokens it was computed from."""
    name = hashlib.sha256(f"{kind} {skip}".encode())
    for part in parts:
        name.update(f" {part.numel()}:".encode())
        name.update(part.contiguous().numpy().tobytes())
    return name.hexdigest()[:40]
