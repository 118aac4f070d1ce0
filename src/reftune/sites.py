"""Sites: which modules of a Hugging Face model to edit, found by structure, never by a table of architectures.

A model's blocks are the `ModuleList` whose members can be gradient-checkpointed, or that the model names in
`_no_split_modules` or `_can_record_outputs["hidden_states"]`: those of the decoder, or of the encoder of an
encoder-decoder. A component is what goes into or comes out of the block, or of the child that it calls its attention or
its feed-forward: in most models the input of those is what their norm has made of the residual stream. Any
other module is named by its path, in the model or in every block.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

COMPONENTS = ("block_output", "block_input", "attention_output", "attention_input", "mlp_output", "mlp_input")
Where = Literal["output", "input"]
Layers = str | int | Sequence[int]


@dataclass(frozen=True)
class Site:
    """A place to edit: the `where` of the module at `path`; `layer` is its block's number, if it has one."""

    path: str
    where: Where
    layer: int | None = None

    def __str__(self) -> str:
        return f"{self.path}.{self.where}"


def number_ranges(numbers: Iterable[int]) -> str:
    """Layer numbers for people: [9, 3, 4, 5] is "3-5, 9"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def find_sites(model: nn.Module, layers: Layers, component: str) -> list[Site]:
    """The sites of a component at the given layers, or those that a path names.

    A path that ends in `.output` or `.input` is that of a module of the model, such as `"h.3.mlp.output"`, which is one
    site, or of a module in every block, such as `"mlp.down_proj.input"`, which is one site for each of the layers.

    Raises ValueError, naming what was looked for and the module paths that would do.
    """
    if component not in COMPONENTS:
        return _in_blocks(model, layers, component) or [_raw_site(model, component)]
    blocks = find_blocks(model)
    where: Where = "input" if component.endswith("_input") else "output"
    return [Site(_component(model, blocks[i], component), where, i) for i in select_layers(layers, len(blocks))]


def select_layers(layers: Layers, depth: int) -> list[int]:
    """Block numbers, ascending: `"mid"` (depth // 2), `"all"`, 3, -1, [3, 9], "3;9", or a depth range "50%-70%"."""
    if layers == "all":
        return list(range(depth))
    if layers == "mid":
        return [depth // 2]
    numbers: list[Any] = []
    if isinstance(layers, str):
        percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*-\s*(\d+(?:\.\d+)?)\s*%\s*", layers)
        if percent:
            low, high = float(percent[1]) / 100, float(percent[2]) / 100
            chosen = [i for i in range(depth) if low - 1e-9 <= i / depth <= high + 1e-9]
            if not chosen:
                raise ValueError(f"layers={layers!r} holds no layer of a model with {depth}: widen the range.")
            return chosen
        with contextlib.suppress(ValueError):
            numbers = [int(part) for part in re.split(r"[;,\s]+", layers.strip("[] "))]
    elif isinstance(layers, int):
        numbers = [layers]
    elif isinstance(layers, Sequence):
        numbers = list(layers)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise ValueError(
            f"layers={layers!r} names no layers. Use 'mid', 'all', a list of numbers, or a depth range '50%-70%'."
        )
    wrong = [n for n in numbers if not -depth <= n < depth]
    if wrong:
        raise ValueError(
            f"layers={layers!r}: the model has {depth} layers, 0 to {depth - 1} (or -{depth} to -1), "
            f"so there is no layer {wrong[0]}."
        )
    return sorted({n % depth for n in numbers})


def find_blocks(model: nn.Module) -> list[str]:
    """The paths of the model's blocks, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    config = getattr(model, "config", None)
    near, every = _block_lists(model, _stack(model)), _block_lists(model, model)
    if not near and not every:
        raise ValueError(
            f"No list of blocks was found in {type(model).__name__}: looked for a ModuleList of layers that can be "
            "gradient-checkpointed, or that _no_split_modules or _can_record_outputs names. Name the module to edit "
            f"yourself, component='<path>.output', for example one of: {', '.join(_examples(model))}."
        )
    blocks = max(near or every, key=len)
    depth = getattr(_text_config(config), "num_hidden_layers", None)
    if isinstance(depth, int) and not getattr(config, "is_encoder_decoder", False):
        # a speech model may have more convolutions than layers, an autoencoder's decoder fewer than its encoder
        lists = near if len(blocks) > depth else [*near, *every]
        blocks = next((blocks for blocks in lists if len(blocks) == depth), blocks)
        if len(blocks) < depth:
            raise ValueError(
                f"{type(model).__name__} runs {depth} layers with {len(blocks)} physical one(s): an edit at one of "
                "them would be made at all. Layers that share weights are not supported."
            )
    return [names[id(block)] for block in blocks]


def _text_config(config: Any) -> Any:
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def _stack(model: nn.Module) -> nn.Module:
    """The decoder, or the encoder of an encoder-decoder; the model itself if it names neither."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    get = getattr(model, "get_encoder" if encodes else "get_decoder", None)
    try:
        stack = get() if callable(get) else None
    except (AttributeError, NotImplementedError, ValueError):
        stack = None
    return stack if isinstance(stack, nn.Module) else model


def _block_lists(model: nn.Module, scope: nn.Module) -> list[nn.ModuleList]:
    named: set[str] = set()
    recorded: tuple[type, ...] = ()
    for module in model.modules():
        named |= set(getattr(module, "_no_split_modules", None) or ())
        specs = (getattr(module, "_can_record_outputs", None) or {}).get("hidden_states", ())
        for spec in specs if isinstance(specs, (list, tuple)) else (specs,):
            target = getattr(spec, "target_class", spec)
            recorded += (target,) if isinstance(target, type) else ()

    def is_block(module: nn.Module) -> bool:
        # the MRO's names, because a wrapper such as FSDP2 or our own swap puts a subclass before the block's class
        bases = {cls.__name__ for cls in type(module).__mro__}
        return bool(bases & (named | {"GradientCheckpointingLayer"})) or isinstance(module, recorded)

    lists = [m for m in scope.modules() if isinstance(m, nn.ModuleList) and len(m) and all(map(is_block, m))]
    inner = {id(child) for m in lists for block in m for child in block.modules() if child is not block}
    return [m for m in lists if id(m) not in inner]


_CHILD = {
    "attention": re.compile(r"attn|attention", re.I),
    "mlp": re.compile(r"mlp|feed_?forward|ffn|moe|dense_?relu_?dense|^ff$", re.I),
}
_READS = re.compile(r"^intermediate$")  # BERT's feed-forward is no module of its own, but its first half is one
_NOT_IT = re.compile(r"norm|drop|cross|enc_?dec|encoder_attn|gate$|scale", re.I)


def _component(model: nn.Module, block: str, component: str) -> str:
    if component.startswith("block"):
        return block
    module, (part, where) = model.get_submodule(block), component.split("_")
    found = _children(module, _CHILD[part])
    if not found and component == "mlp_input":
        found = _children(module, _READS)
    if len(found) != 1:
        children = ", ".join(f"'{block}.{n}.{where}'" for n, _ in module.named_children())
        what = "nothing" if not found else " and ".join(found)
        raise ValueError(
            f"component={component!r}: looked for the one child of '{block}' ({type(module).__name__}) that is its "
            f"{part}, found {what}. Name it yourself, component=... one of: {children}."
        )
    return f"{block}.{found[0]}"


def _children(module: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    """The shallowest with such a name: "self_attn" before "self_attn.q_proj" or an attention inside an expert."""
    found: list[str] = []
    for name in sorted((n for n, _ in module.named_modules() if n), key=lambda n: n.count(".")):
        leaf = name.rsplit(".", 1)[-1]
        if pattern.search(leaf) and not _NOT_IT.search(leaf):
            if found and name.count(".") > found[0].count("."):
                break
            found.append(name)
    return found


def _in_blocks(model: nn.Module, layers: Layers, component: str) -> list[Site]:
    """The sites of a module that is in the blocks; none if that is the path of a module of the model, or of none."""
    if not _is_path(component):
        return []
    path, where = _parsed(component)
    modules = dict(model.named_modules())
    if path in modules or not any(name.endswith(f".{path}") for name in modules):
        return []
    blocks = find_blocks(model)
    having = [i for i, block in enumerate(blocks) if f"{block}.{path}" in modules]
    chosen = select_layers(layers, len(blocks)) if having else []
    if lacking := sorted(set(chosen) - set(having)):
        raise ValueError(
            f"component={component!r}: the layers {number_ranges(lacking)} have no '{path}'. These have: {having}."
        )
    return [Site(_no_list(modules, f"{blocks[i]}.{path}", component), where, i) for i in chosen]


def _is_path(component: str) -> bool:
    return isinstance(component, str) and re.fullmatch(r"[^.].*\.(output|input)", component) is not None


def _parsed(component: str) -> tuple[str, Where]:
    path, where = re.sub(r"\[(\d+)\]", r".\1", component).rsplit(".", 1)
    return path, "input" if where == "input" else "output"


def _no_list(modules: dict[str, nn.Module], path: str, component: str) -> str:
    if isinstance(modules[path], (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterDict)):
        raise ValueError(f"component={component!r}: '{path}' is a {type(modules[path]).__name__}; name a member of it.")
    return path


def _raw_site(model: nn.Module, component: str) -> Site:
    if not _is_path(component):
        near = difflib.get_close_matches(str(component), COMPONENTS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown component {component!r}.{hint} Known: {', '.join(COMPONENTS)}, or a module path that ends in "
            "'.output' or '.input', such as 'model.layers[3].mlp.output', or 'mlp.output' in every layer."
        )
    path, where = _parsed(component)
    modules = dict(model.named_modules())
    if path not in modules:
        near = difflib.get_close_matches(path, list(modules), n=3, cutoff=0.3) or _examples(model)
        raise ValueError(
            f"component={component!r}: {type(model).__name__} has no module '{path}'. "
            f"Near it: {', '.join(near)} (add '.output' or '.input')."
        )
    _no_list(modules, path, component)
    layer = re.search(r"\.(\d+)(\.|$)", path)
    return Site(path, where, int(layer[1]) if layer else None)


def _examples(model: nn.Module) -> list[str]:
    deepest = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters(False))]
    step = max(1, math.ceil(len(deepest) / 4))
    return [f"{name}.output" for name in deepest[::step]]
