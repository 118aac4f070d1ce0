"""Trying a base model out on a small random input, adapters off: which layer's output is which, what a shift does.

And the config flags by which an architecture gives its linear layers biases, found by building it without memory.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import STATES
from .session import Session

ROWS, TOKENS = 2, 6


class Probe:
    """Runs a base model on one random input, in eval mode, without gradients, and without its adapters."""

    def __init__(self, model: nn.Module, session: Session) -> None:
        self.model, self.session = model, session
        self._inputs: dict[str, Tensor] | None = None

    def outputs(self, modules: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
        """The hidden states that each module gave out, one tensor a call; keys in the order of the first calls."""
        return self._recorded(modules, lambda args, kwargs, output: hidden_states(output))

    def inputs_of(self, modules: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
        """The hidden states that each module was called with, in the same way."""
        return self._recorded(modules, lambda args, kwargs, output: called_with(args, kwargs))

    def _recorded(self, modules: dict[str, nn.Module], states_of: Callable[..., Any]) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}

        def record(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                states = states_of(args, kwargs, output)
                if states is not None:
                    found.setdefault(name, []).append(states.detach())

            return hook

        handles = [module.register_forward_hook(record(name), with_kwargs=True) for name, module in modules.items()]
        try:
            with self.session_off():
                self.run()
        finally:
            for handle in handles:
                handle.remove()
        return found

    def shift(self, linear: nn.Module, module: nn.Module) -> float | None:
        """α if adding any v to the output of `linear` adds αv to the output of `module`, else None."""
        (before,) = self.outputs({"": module})[""]
        same: Any = {"generator": torch.Generator("cpu").manual_seed(1), "device": "cpu"}  # alike on every device
        v = torch.randn(before.shape[-1], dtype=torch.float64, **same)
        v = (v * float(before.float().square().mean().sqrt())).to(before)
        handle = linear.register_forward_hook(lambda module, args, output: output + v)
        try:
            (after,) = self.outputs({"": module})[""]
        finally:
            handle.remove()
        change, v = (after.cpu().double() - before.cpu().double()).reshape(-1, len(v)), v.cpu().double()
        scale = float((change @ v).mean() / v.square().sum())
        off = float((change - scale * v).abs().max() / v.abs().max())
        return scale if abs(scale) > 1e-3 and off < precision(before.dtype) * abs(scale) else None

    def run(self) -> Tensor:
        """The model's first output, its logits or hidden states, adapters as they are."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                return self.model(**self.inputs)[0]
        finally:
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def session_off(self) -> Iterator[None]:
        before, self.session.enabled = self.session.enabled, False
        try:
            yield
        finally:
            self.session.enabled = before

    @property
    def possible(self) -> bool:
        """Whether a random input can be made for this model."""
        try:
            return bool(self.inputs)
        except ValueError:
            return False

    @property
    def inputs(self) -> dict[str, Tensor]:
        if self._inputs is None:
            self._inputs = random_inputs(self.model)
        return self._inputs


def precision(dtype: torch.dtype) -> float:
    """How far two computations of one thing may lie apart, relative to its largest number."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


def random_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Token ids (2, 6), or pixels, as the model's config tells; a ValueError for models with other inputs."""
    same: Any = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
    parameter = next(model.parameters())
    config: Any = model.config
    text = config.get_text_config()
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids" and isinstance(getattr(text, "vocab_size", None), int):
        ids = torch.randint(0, text.vocab_size, (ROWS, TOKENS), **same).to(parameter.device)
        return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        pixels = torch.randn(ROWS, getattr(config, "num_channels", 3), height, width, **same)
        return {"pixel_values": pixels.to(parameter.device, parameter.dtype)}
    raise ValueError(
        f"{type(model).__name__} takes {name!r}, of which no random input could be made to find the layer to merge "
        "into. An edit of a linear layer itself, component='<path of the layer>.output', needs none."
    )


def hidden_states(output: Any) -> Tensor | None:
    """The states that an edit of this module's output would edit."""
    if isinstance(output, tuple):
        output = output[0] if output else None
    output = getattr(output, "last_hidden_state", output)
    return output if isinstance(output, Tensor) else None


def called_with(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The states that an edit of this call's input would edit."""
    first = args[:1] or [kwargs[name] for name in STATES if isinstance(kwargs.get(name), Tensor)]
    return first[0] if first and isinstance(first[0], Tensor) else None


def bias_flags(model: nn.Module, layers: list[str]) -> list[str] | None:
    """Names of config flags that together give these linear layers a bias and change nothing else; None if none do."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config()
    flags, missing = [], set(layers)
    for name, value in vars(text).items():
        if "bias" in name and value is False and missing:
            gained = {path.removesuffix(".bias") for path in _gained(model, [name])}
            if gained & missing:
                flags.append(name)
                missing -= gained
    return None if missing else flags


def add_biases(model: nn.Module, flags: list[str]) -> Callable[[], None]:
    """Set the flags and give every layer that they concern a bias of zeros; returns what takes both away again."""
    modules = []
    for path, shape in _gained(model, flags).items():
        module = model.get_submodule(path.removesuffix(".bias"))
        modules.append(module)
        weight: Any = module.weight
        bias = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        module.register_parameter("bias", nn.Parameter(bias, requires_grad=weight.requires_grad))
    _set_flags(model.config, flags, True)

    def undo() -> None:
        for module in modules:
            module.register_parameter("bias", None)
        _set_flags(model.config, flags, False)

    return undo


def _set_flags(config: Any, flags: list[str], value: bool) -> None:
    for name in flags:
        setattr(config.get_text_config(), name, value)


def _gained(model: nn.Module, flags: list[str]) -> dict[str, torch.Size]:
    """The biases that the model would have besides its own with these flags set; {} if anything else changed too."""
    config: Any = copy.deepcopy(model.config)
    _set_flags(config, flags, True)
    try:
        with torch.device("meta"):
            twin = type(model)(config)
    except Exception:  # whatever a constructor of somebody else's may raise: then there is no such flag
        return {}
    mine = {name for name, _ in model.named_parameters() if ".reft_" not in name}
    there = {name: parameter.shape for name, parameter in twin.named_parameters()}
    new = set(there) - mine
    if mine - set(there) or not all(name.endswith(".bias") for name in new):
        return {}
    return {name: there[name] for name in sorted(new)}
