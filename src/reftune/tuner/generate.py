"""`generate` with a prompt: says which columns are the prompt before the first forward pass of a generation.

Bound to the base model, so that every way to it (PeftModel.generate, pipelines, trainers, the base model itself)
goes through here. Without it a model called without a cache, in chunks, or with candidate tokens of an assistant would
take every token it is handed for prompt. Continuous batching, which has a loop of its own in another thread, is bound
too, so that what cannot be exact there is refused where it is asked for.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Prompt
from .session import ATTRIBUTE, Session, remember
from .unplaced import CONTINUOUS, check_everywhere


def bind(model: nn.Module) -> None:
    """Put our `generate` and `init_continuous_batching` before the model's own, if it has them."""
    for method in _BOUND:
        if callable(_own(model, method.__name__)):
            # no bound method: a pickle names that one by the model and "generate", which reads as the class's own
            model.__dict__.setdefault(method.__name__, partial(method, model))


def unbind(model: nn.Module) -> None:
    """Take them away again."""
    for method in _BOUND:
        model.__dict__.pop(method.__name__, None)


def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's `generate`, with the prompt's columns made known to the ReFT layers."""
    session: Session | None = self.__dict__.get(ATTRIBUTE)
    original = _own(self, "generate")
    subspaces = kwargs.pop("subspaces", None)
    if session is None or not session.editing or session.state.prompt is not None:  # an assistant that is the model
        return original(self, *args, **kwargs)
    prompt = _prompt(original, self, session, args, kwargs)
    state = session.state
    state.prompt, state.subspaces, state.generating = prompt, subspaces, True
    try:
        return original(self, *args, **kwargs)
    finally:
        state.prompt = state.subspaces = None
        state.generating = False
        if prompt is not None:
            cache, prompt.cache = prompt.cache, None  # the two do not hold each other: a cache is freed at once
            remember(cache, prompt)  # who decodes on by hand goes on from this prompt


def init_continuous_batching(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's own, which `generate_batch` calls too, if the adapters in use are exact in it."""
    session: Session | None = self.__dict__.get(ATTRIBUTE)
    if session is not None and session.editing:
        if session.state.mix is not None:
            raise ValueError(
                "A composition used by `with` is on in this thread alone, and continuous batching generates in "
                "another: use its apply(model)."
            )
        check_everywhere(CONTINUOUS, session.names, session.layers)
    return _own(self, "init_continuous_batching")(self, *args, **kwargs)


_BOUND = (generate, init_continuous_batching)


def _own(model: nn.Module, name: str) -> Any:
    """The method of the model's class, which ours stands before; None if it has none."""
    return getattr(type(model), name, None)


def _prompt(
    original: Any, model: nn.Module, session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Prompt | None:
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
    guided = _setting(model, named, "guidance_scale") not in (None, 1)
    if guided and _setting(model, named, "use_cache") is False:  # nothing tells the two sequences' passes apart
        check_everywhere("Guidance without a cache", session.names, session.layers)
        guided = False
    return Prompt(columns, mask, torch.tensor(columns, device=device), guided=guided)


def _setting(model: nn.Module, named: dict[str, Any], name: str) -> Any:
    """A setting of a generation: its argument, else its config's, else the model's; None if none says."""
    configs = (named.get("generation_config"), getattr(model, "generation_config", None))
    told = [named.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in told if value is not None), None)
