"""`generate` with a prompt: says which columns are the prompt before the first forward pass of a generation.

Bound to the base model, so that every way to it (PeftModel.generate, pipelines, trainers, the base model itself)
goes through here. Without it a model called without a cache, in chunks, or with candidate tokens of an assistant would
take every token it is handed for prompt.
"""

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Prompt
from .session import ATTRIBUTE, Session


def bind(model: nn.Module) -> None:
    """Put our `generate` before the model's own, if it has one."""
    if callable(getattr(type(model), "generate", None)) and "generate" not in model.__dict__:
        model.__dict__["generate"] = MethodType(generate, model)


def unbind(model: nn.Module) -> None:
    """Take it away again."""
    model.__dict__.pop("generate", None)


def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's `generate`, with the prompt's columns made known to the ReFT layers."""
    session: Session | None = self.__dict__.get(ATTRIBUTE)
    original: Any = type(self).generate  # type: ignore[attr-defined]
    subspaces = kwargs.pop("subspaces", None)
    if session is None or not session.editing or session.state.prompt is not None:  # an assistant that is the model
        return original(self, *args, **kwargs)
    prompt = _prompt(original, self, args, kwargs)
    state = session.state
    state.prompt, state.subspaces = prompt, subspaces
    try:
        return original(self, *args, **kwargs)
    finally:
        state.prompt = state.subspaces = None
        if prompt is not None and prompt.cache is not None:
            prompt.cache._reft_prompt = prompt  # who decodes on by hand goes on from this prompt


def _prompt(original: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt | None:
    try:
        bound = inspect.signature(original).bind_partial(model, *args, **kwargs).arguments
    except TypeError:
        bound = {}
    named = {**bound, **bound.get("kwargs", {}), **kwargs}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None  # the encoder reads its whole input in one pass
    mask = named.get("attention_mask")
    columns, device = 0, None
    for key in ("inputs", "input_ids", "inputs_embeds", "attention_mask"):
        value = named.get(key)
        if isinstance(value, Tensor) and value.dim() >= 2:
            columns, device = max(columns, value.shape[1]), value.device
    if columns == 0:  # begins with bos alone
        columns = 1
    mask = mask.to(torch.bool) if isinstance(mask, Tensor) and mask.dim() == 2 else None
    return Prompt(columns, mask, torch.tensor(columns, device=device))
