"""What a saved adapter is, from its files alone: `describe("runs/emoji")` reads the config and the tensors, no base.

info = describe("runs/emoji")
info.parameters, info.nbytes, info.orthonormality_error
for site in info.sites: print(site.name, site.positions, site.rank)
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..interventions import INTERVENTIONS, orthonormality_error
from ..positions import groups
from ..tuner.atomic import CONFIG, WEIGHTS, config_beside_weights
from .card import layers_in_words

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.*?)\.?edit_(?P<where>output|input)\.reft_(?P<group>[^.]+)\.(?P<name>.+)"
)
_LORA = re.compile(r"\.lora_\w+(\.|$)")


@dataclass(frozen=True)
class SiteInfo:
    """One intervention: the place it edits, for which terms of the positions, and its weights."""

    name: str  # "model.layers.15.output"
    positions: str  # "f2"
    kind: str
    rank: int | None
    parameters: int
    dtype: str
    orthonormality_error: float | None  # max |R Rᵀ − I|; None where the kind has no orthonormal R


@dataclass(frozen=True)
class AdapterInfo:
    """A saved adapter: its config in short, and its interventions."""

    directory: str
    base_model: str | None
    base_model_shape: dict[str, Any]
    task_type: str | None
    kind: str  # several are joined by ", "
    positions: str
    layers: str  # block numbers in ranges, "0-3, 15"
    rank: str
    sites: tuple[SiteInfo, ...]
    parameters: int  # of the interventions
    other_parameters: int  # of modules_to_save
    lora_parameters: int  # of its LoRA part
    nbytes: int  # of the weights file
    dtype: str

    @property
    def site_names(self) -> tuple[str, ...]:
        """The edited places, each once."""
        return tuple(dict.fromkeys(site.name for site in self.sites))

    @property
    def orthonormality_error(self) -> float | None:
        """The largest of all sites; None where no kind has an orthonormal R."""
        errors = [site.orthonormality_error for site in self.sites if site.orthonormality_error is not None]
        return max(errors, default=None)


def describe(directory: str | Path) -> AdapterInfo:
    """Read `adapter_config.json` and `adapter_model.safetensors` of an adapter.

    A kind of your own is described too, but its orthonormality only if the module that registers it is imported.

    Raises:
        FileNotFoundError: the directory or one of the two files is missing.
        ValueError: the files are damaged, or the adapter is not a ReFT adapter.
    """
    folder = Path(directory)
    config = _read_config(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}. The file is damaged; save it again.") from error
    found: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    other = lora = 0
    for key, tensor in tensors.items():
        parts = _KEY.fullmatch(key)
        if parts is None and config.get("lora") and _LORA.search(key):
            lora += tensor.numel()
        elif parts is None:
            other += tensor.numel()
        else:
            found.setdefault((parts["path"], parts["where"], parts["group"]), {})[parts["name"]] = tensor
    if not found:
        raise ValueError(
            f"{folder / WEIGHTS} holds no intervention: none of its {len(tensors)} keys reads like "
            "'...edit_output.reft_f2.R'. Save the adapter again with save_pretrained."
        )
    sites = tuple(
        _site(path, where, group, weights, config)
        for (path, where, group), weights in sorted(found.items(), key=_natural)
    )
    edits = config.get("representations") or [config]
    return AdapterInfo(
        directory=str(folder),
        base_model=config.get("base_model_name_or_path"),
        base_model_shape=dict(config.get("base_model_shape") or {}),
        task_type=config.get("task_type"),
        kind=_each(site.kind for site in sites),
        positions=_each(edit.get("positions", config.get("positions")) for edit in edits),
        layers=layers_in_words([site.name for site in sites]),
        rank=_each(site.rank for site in sites if site.rank is not None),
        sites=sites,
        parameters=sum(site.parameters for site in sites),
        other_parameters=other,
        lora_parameters=lora,
        nbytes=(folder / WEIGHTS).stat().st_size,
        dtype=_each(site.dtype for site in sites),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """The config that the weights were saved with, else the one beside them."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            found = f"it has no {name}" if folder.is_dir() else "there is no such directory"
            raise FileNotFoundError(f"No adapter in {folder}: {found}. Give the directory that save_pretrained wrote.")
    try:
        text = config_beside_weights(folder) or (folder / CONFIG).read_text(encoding="utf-8")
        config = json.loads(text)
        method = config.get("peft_type")
    except (SafetensorError, OSError, AttributeError, ValueError) as error:
        raise ValueError(f"The adapter in {folder} cannot be read: {error}. Save it again.") from error
    if method != "REFT":
        raise ValueError(f"The adapter in {folder} is not a ReFT adapter: its peft_type is {method!r}.")
    return config


def _site(path: str, where: str, group: str, weights: Mapping[str, Tensor], config: dict[str, Any]) -> SiteInfo:
    kind = _kind(path, where, group, config)
    known = INTERVENTIONS.get(kind)
    own = {name: tensor for name, tensor in weights.items() if ".others_" not in f".{name}"}  # what it stays out of
    matrices = [tensor for tensor in own.values() if tensor.ndim == 2]
    rows = [tensor for name, tensor in own.items() if name.rpartition(".")[2] == "R"]
    error = None
    if rows and known is not None and known.orthonormal:
        divided = any(name.startswith("subspace_") for name in own)  # then orthonormal as a whole
        error = max(float(orthonormality_error(r)) for r in ([torch.cat(rows)] if divided else rows))
    return SiteInfo(
        name=f"{path}.{where}" if path else where,
        positions=group,
        kind=kind,
        rank=sum(len(r) for r in rows) or (int(matrices[0].shape[0]) if matrices else None),
        parameters=sum(tensor.numel() for tensor in own.values()),
        dtype=_each(str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()),
        orthonormality_error=error,
    )


def _kind(path: str, where: str, group: str, config: dict[str, Any]) -> str:
    """The kind at a site. With representations of several kinds, the entry that names this site and group."""
    entries = config.get("representations") or []
    kinds = dict.fromkeys(entry["intervention"] for entry in entries)
    if len(kinds) <= 1:
        return str(next(iter(kinds), config.get("intervention")))
    matching = [
        entry
        for entry in entries
        if group in groups(entry["positions"], bool(config.get("share_weights"))) and _is_at(entry, path, where, config)
    ]
    exact = [entry for entry in matching if "." in entry["component"]]  # "mlp_output" may be any module in an mlp
    return " or ".join(dict.fromkeys(entry["intervention"] for entry in exact or matching) or kinds)


def _is_at(entry: dict[str, Any], path: str, where: str, config: dict[str, Any]) -> bool:
    component = str(entry["component"])
    module = re.sub(r"\[(\d+)\]", r".\1", component)
    if module == f"{path}.{where}":
        return True
    number = re.search(r"\.(\d+)(?:\.(.+))?$", path)
    if number is None:
        return False
    depth = (config.get("base_model_shape") or {}).get("num_hidden_layers")
    layer = entry["layer"]
    if isinstance(layer, int) and layer < 0 and depth:
        layer += depth
    if isinstance(layer, int) and layer != int(number[1]):
        return False
    child = number[2]
    if "." in component:
        return module == f"{child}.{where}"
    if component.startswith("block"):
        return child is None and component == f"block_{where}"
    attends = child is not None and re.search(r"attn|attention", child, re.I) is not None
    return child is not None and component == f"{'attention' if attends else 'mlp'}_{where}"


def _natural(item: tuple[tuple[str, str, str], Any]) -> list[Any]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", "/".join(item[0]))]


def _each(values: Any) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))
