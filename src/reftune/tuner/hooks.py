"""How a layer is attached to the module it edits, so that the edit is right under gradient checkpointing too.

transformers ≥ 5.22 checkpoints a block's `forward`: hooks on the block stay outside and run once. Before, `__call__`
was checkpointed, hooks and all; there the block's class is swapped for one whose `forward` edits (the oldest versions
record hidden states around `forward`, so a hook would come too late) and whose `__call__` prepares the recomputation.
Whatever is recomputed, there or inside a block, is handed the pass it belongs to. The model's class is swapped, too,
for one whose `forward` opens the pass if it is called past the hooks.

Hooks are functions of the module alone: a copy or a replica of the model finds its own layer, never the original's.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .session import ATTRIBUTE, Session
from .training import check_training, check_turns

CHECKPOINTS_CALL = "__call__" in GradientCheckpointingLayer.__dict__
CHILD = {"output": "edit_output", "input": "edit_input"}
STATES = ("hidden_states", "x", "input", "inputs")  # what modules call them


def attach(module: nn.Module, where: str) -> None:
    """Edit what goes into or comes out of the module by its child `edit_input` / `edit_output`."""
    if CHECKPOINTS_CALL and isinstance(module, GradientCheckpointingLayer):
        module.__dict__[ATTRIBUTE] = getattr(module, CHILD[where]).session
        _swap_class(module, _editing)
        if "forward" not in module.__dict__:  # accelerate has not put its own before the class's
            return
    if where == "output":
        _handles(module)["output"] = module.register_forward_hook(_edit_output)
    else:
        _handles(module)["input"] = module.register_forward_pre_hook(_edit_input, with_kwargs=True)


def watch_checkpointing(module: nn.Module) -> None:
    """Let the recomputation of this block find the forward pass it belongs to; called for blocks around a site."""
    if CHECKPOINTS_CALL:
        _swap_class(module, _editing)
    elif "checkpointing" not in _handles(module):
        _handles(module)["checkpointing"] = module.register_forward_pre_hook(_before_checkpoint, with_kwargs=True)


def watch_model(module: nn.Module, session: Session, top: bool) -> None:
    """Open and close the session around the module's forward."""
    module.__dict__[ATTRIBUTE] = session
    if top:
        _swap_class(module, _opening)
    if "open" not in _handles(module):
        before = _open_top if top else _open_inner
        _handles(module)["open"] = module.register_forward_pre_hook(before, with_kwargs=True)
        _handles(module)["close"] = module.register_forward_hook(_close, with_kwargs=True, always_call=True)


def watch_training(module: nn.Module) -> None:
    """Check the passes of an encoder-decoder to train with, whose stacks open the session each for itself."""
    if "training" not in _handles(module):
        _handles(module)["training"] = module.register_forward_pre_hook(_check_training, with_kwargs=True)


def watch_whole(model: nn.Module, session: Session) -> None:
    """Let the modules that adapters train whole (`modules_to_save`) take each row of a mixed batch by its adapter."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and "rows" not in _handles(module):
            module.__dict__[ATTRIBUTE] = session
            _handles(module)["rows"] = module.register_forward_pre_hook(_name_rows, with_kwargs=True)


def detach(module: nn.Module) -> None:
    """Undo all of the above on one module."""
    for handle in module.__dict__.pop("_reft_handles", {}).values():
        handle.remove()
    module.__dict__.pop(ATTRIBUTE, None)
    if "_reft_swapped" in type(module).__dict__:  # and nobody, as FSDP does, has put a class of their own before it
        module.__class__ = type(module).__mro__[1]


def detach_all(model: nn.Module) -> None:
    """Undo it on a model that has no adapter any more."""
    for module in model.modules():
        detach(module)


def _handles(module: nn.Module) -> dict[str, Any]:
    handles: dict[str, Any] = module.__dict__.setdefault("_reft_handles", {})
    return handles


def _edit_output(module: Any, args: Any, output: Any) -> Any:
    layer = module._modules["edit_output"]
    if layer.session.threads.state.idle:  # a decode step, mostly: a property here would cost it half a percent
        return output
    if isinstance(output, Tensor):
        return layer(output)
    if isinstance(output, tuple):
        return (layer(output[0]), *output[1:])
    if hasattr(output, "last_hidden_state"):
        output.last_hidden_state = layer(output.last_hidden_state)
        return output
    raise ValueError(
        f"{type(module).__name__} returns a {type(output).__name__}, in which reftune finds no hidden states; "
        "name a module whose output is a tensor or a tuple that begins with one."
    )


def _edit_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if module._modules["edit_input"].session.threads.state.idle:
        return args, kwargs
    if args and isinstance(args[0], Tensor):
        return (module.edit_input(args[0]), *args[1:]), kwargs
    for name in STATES:
        if isinstance(kwargs.get(name), Tensor):
            return args, {**kwargs, name: module.edit_input(kwargs[name])}
    raise ValueError(f"{type(module).__name__} was called without hidden states that reftune could edit.")


def _open_top(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    session: Session = module.__dict__[ATTRIBUTE]
    check_training(module, session, kwargs)
    kwargs = session.open(module, args, kwargs, top=True)
    check_turns(module, session)
    return args, kwargs


def _check_training(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check_training(module, module.__dict__[ATTRIBUTE], kwargs)


def _open_inner(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, module.__dict__[ATTRIBUTE].open(module, args, kwargs, top=False)


def _close(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    module.__dict__[ATTRIBUTE].close(module, kwargs, output)


def _name_rows(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = module.__dict__[ATTRIBUTE].state.adapter_names
    if names is None:
        return None
    has, times = module._get_available_adapters(), max(1, len(args[0]) // len(names))  # beams repeat rows
    own = [name if name in has else "__base__" for name in names for _ in range(times)]
    return args, {**kwargs, "adapter_names": own}


class _CarriesPass:
    """A checkpointing function that recomputes under the forward pass it was called in."""

    def __init__(self, function: Any, session: Session) -> None:
        self.function, self.session = function, session

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.session.batch

        def recomputable(*inputs: Any, **named: Any) -> Any:
            state = self.session.state  # the backward may run in another thread
            before, state.batch = state.batch, batch
            try:
                return block(*inputs, **named)
            finally:
                state.batch = before

        return self.function(recomputable, *args, **kwargs)


def _before_checkpoint(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not (module.training and getattr(module, "gradient_checkpointing", False)):
        return None
    function = module._gradient_checkpointing_func
    if not isinstance(function, _CarriesPass):
        module._gradient_checkpointing_func = _CarriesPass(function, module.__dict__[ATTRIBUTE])
    else:
        function = function.function
    if isinstance(function, functools.partial) and function.keywords.get("use_reentrant") is False:
        return None
    # A reentrant checkpoint none of whose inputs needs a gradient gives its parameters none, without a word.
    if args and isinstance(args[0], Tensor) and torch.is_grad_enabled() and not args[0].requires_grad:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return None


def _swap_class(module: nn.Module, swapped: Callable[[Any], type]) -> None:
    cls: Any = type(module)
    if not getattr(cls, "_reft_swapped", False):
        module.__class__ = swapped(cls)


@functools.cache
def _opening(cls: Any) -> type:
    """A model whose `forward`, called past the hooks (as sentence-transformers calls it), opens the session itself."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        session: Session | None = self.__dict__.get(ATTRIBUTE)
        if session is None or id(self) in session.state.open:
            return cls.forward(self, *args, **kwargs)
        args, kwargs = _open_top(self, args, kwargs)
        output = None
        try:
            output = cls.forward(self, *args, **kwargs)
        finally:
            _close(self, args, kwargs, output)
        return output

    return _subclass(cls, _opening, forward=forward)


@functools.cache
def _editing(cls: Any) -> type:
    """A block that edits in its `forward` what its checkpointing would keep out of the hooks' reach."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = self.__dict__.get("_reft_handles", ())
        if hasattr(self, "edit_input") and "input" not in hooks:
            args, kwargs = _edit_input(self, args, kwargs)
        output = cls.forward(self, *args, **kwargs)
        return _edit_output(self, args, output) if hasattr(self, "edit_output") and "output" not in hooks else output

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _before_checkpoint(self, args, kwargs) or (args, kwargs)
        return cls.__call__(self, *args, **kwargs)

    return _subclass(cls, _editing, forward=forward, __call__=call)


def _subclass(cls: Any, swapped: Callable[[Any], type], **methods: Any) -> type:
    """Output recorders, FSDP and `save_pretrained` go by the class's name: the swapped one keeps it."""

    def reduce(self: Any, protocol: Any) -> Any:  # pickle cannot find this class by its name
        return (_restore, (cls, swapped), *cls.__reduce_ex__(self, protocol)[2:])

    own = {**methods, "__reduce_ex__": reduce, "_reft_swapped": True}
    return type(cls.__name__, (cls,), {**own, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _restore(cls: Any, swapped: Callable[[Any], type]) -> Any:
    module = cls.__new__(cls)
    _swap_class(module, swapped)
    return module
