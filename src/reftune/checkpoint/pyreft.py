"""Read what pyreft saved: `reft_model.save(directory)` there, `load_pyreft(directory, positions=...)` here.

    config = reftune.load_pyreft("my-pyreft-adapter", positions="f2+l2")
    model = reftune.get_reft_model(base, config)          # edits as pyreft does; save_pretrained keeps it as ours

A pyreft directory holds `config.json` (one list per representation) and one `intkey_<site>.bin` each, a pickled state
dict that is read with `weights_only=True`.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..interventions import Intervention, intervention_class, orthonormality_error
from ..positions import parse
from ..sites import COMPONENTS
from ..tuner import ReftConfig

# pyreft's class → ours, and ours with a free R, which has the same formula.
_KINDS = {
    "LoreftIntervention": ("loreft", "noreft"),
    "NoreftIntervention": ("noreft", "noreft"),
    "ConsreftIntervention": ("consreft", "noreft"),
    "LobireftIntervention": ("lobireft", "nodireft"),
    "DireftIntervention": ("direft", "nodireft"),
    "NodireftIntervention": ("nodireft", "nodireft"),
}
_ORTHONORMAL = 1e-5  # beyond it, R is kept as it is by the kind with a free R
_PATH = re.compile(r"[\w.\[\]]+\.(output|input)")


class _Representation(NamedTuple):
    """The first fields of pyvene's RepresentationConfig; the others do not change an edit."""

    layer: int
    component: str
    unit: str
    max_number_of_units: int
    low_rank_dimension: int | None

    def key(self, separator: str) -> str:
        """pyvene's name for the file; "." was the separator up to February 2025, "_" has been since."""
        path = self.component
        where = "" if "." in path else f"layer{separator}{self.layer}{separator}"
        component, unit = (text.replace(".", separator) for text in (path, self.unit))
        parts = ("comp", component, "unit", unit, "nunit", str(self.max_number_of_units))
        return where + separator.join(parts)


def load_pyreft(
    directory: str | Path, positions: str | Sequence[str] | None = None, *, act_fn: str | None = None, **config: Any
) -> ReftConfig:
    """A config whose `representations` hold the interventions that pyreft saved in `directory`, in fp32.

    pyreft does not store where it edits, nor `act_fn`, nor dropout: positions were passed with every call, and the
    others are lost in its own `load` too. So you name them.

    Args:
        directory: what `reft_model.save(directory)` wrote (after training: its `intervenable_model` directory).
        positions: as in `ReftConfig`. Where the save has several interventions at one site, as `"f2+l2"` without
            `share_weights` makes in pyreft, the first gets the first term and so on; where it has one, that one edits
            at all terms. Or a sequence, one expression for each representation in the order of the save. None takes
            what pyreft's own examples train with, "l1" for one intervention a site and "f1+l1" for two, and warns.
        act_fn: the function on the learned source that the adapter was trained with.
        **config: further fields of `ReftConfig`, such as `task_type="CAUSAL_LM"`.

    The edits equal pyreft's in eval mode without dropout. Where an R is not orthonormal to 1e-5, as after pyreft has
    trained on a loaded adapter or in bf16, the intervention becomes the one with a free R and the same formula, with a
    warning, since orthonormalising R would change what it does. Interventions that were linked come back as copies.

    Raises:
        FileNotFoundError: `directory` is not what pyreft saved, or a file of it is missing.
        ValueError: an unknown intervention or component, tensors missing or of the wrong shape, positions that do not
            fit the interventions.
    """
    folder = Path(directory)
    representations, types = _read_config(folder)
    files = _find_files(folder, representations)
    if positions is None:
        positions = _usual_positions(representations)
        warnings.warn(
            f"pyreft does not save where it edits: {folder} is loaded with positions={positions!r}, which its examples "
            "use. If it was trained at other tokens, pass positions=...",
            UserWarning,
            stacklevel=2,
        )
    terms = _deal_positions(positions, representations)
    if (folder / "pytorch_model.bin").exists():
        warnings.warn(
            f"{folder} also holds trained weights of the model itself (pytorch_model.bin), such as a classification "
            "head or LoRA. They are not part of the interventions and were not loaded.",
            UserWarning,
            stacklevel=2,
        )
    entries = []
    for representation, kind, file, expression in zip(representations, types, files, terms, strict=True):
        intervention = _read_intervention(file, kind, representation.low_rank_dimension, act_fn)
        entry: dict[str, Any] = {
            "component": representation.component,
            "positions": expression,
            "intervention": intervention,
        }
        if representation.component in COMPONENTS:
            entry["layer"] = representation.layer
        entries.append(entry)
    return ReftConfig(representations=entries, **config)


def _read_config(folder: Path) -> tuple[list[_Representation], list[str]]:
    path = folder / "config.json"
    if not path.is_file():
        found = "there is no such directory" if not folder.is_dir() else "it has no config.json"
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = " It holds a PEFT adapter: load it with peft.PeftModel.from_pretrained."
        elif (folder / "intervenable_model" / "config.json").is_file():
            hint = f" Give {folder / 'intervenable_model'}, where pyreft's trainer puts it."
        raise FileNotFoundError(f"{folder} is not what pyreft saved: {found}.{hint}")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        representations = [_Representation(*fields[:5]) for fields in saved["representations"]]
        types = [str(name) for name in saved["intervention_types"]]
        if not representations or len(types) != len(representations):
            raise ValueError(f"{len(representations)} representations and {len(types)} intervention_types")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the config of a pyreft save ({type(error).__name__}: {error}): it should list "
            "'representations' and as many 'intervention_types'. Give the directory that reft_model.save(...) wrote."
        ) from error
    for number, (representation, name) in enumerate(zip(representations, types, strict=True)):
        module, _, cls = name.removeprefix("<class '").removesuffix("'>").rpartition(".")
        if cls not in _KINDS or module.partition(".")[0] != "pyreft":
            raise ValueError(
                f"{path}: intervention {number} is a {module}.{cls}, which reftune does not know. Known are pyreft's "
                f"{', '.join(_KINDS)}. For one of your own, subclass reftune.Intervention and copy its weights."
            )
        types[number] = cls
        component = representation.component
        if component not in COMPONENTS and not _PATH.fullmatch(component):
            raise ValueError(
                f"{path}: intervention {number} edits the component {component!r}; reftune edits "
                f"{', '.join(COMPONENTS)} and module paths that end in '.output' or '.input'."
            )
        if representation.unit != "pos":
            raise ValueError(
                f"{path}: intervention {number} edits the unit {representation.unit!r}; reftune edits tokens only "
                "('pos'), not heads or steps."
            )
    return representations, types


def _find_files(folder: Path, representations: Sequence[_Representation]) -> list[Path]:
    """The .bin of every representation; the sites of one name are numbered #0, #1, ... in their order."""
    files = []
    seen: Counter[str] = Counter()
    for representation in representations:
        number = seen[representation.key("_")]
        seen[representation.key("_")] += 1
        names = [f"intkey_{representation.key(separator)}#{number}.bin" for separator in ("_", ".")]
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            others = sorted(path.name for path in folder.glob("*.bin"))
            raise FileNotFoundError(
                f"{folder} has no {names[0]}, the weights of an intervention that its config.json lists. "
                f"It has: {', '.join(others) or 'no .bin file'}. Copy the whole directory that pyreft saved."
            )
        files.append(file)
    return files


def _usual_positions(representations: Sequence[_Representation]) -> str:
    """`make_last_position_supervised_data_module` edits the last prompt token; `train.py` the first and the last."""
    most = max(Counter(representation.key("_") for representation in representations).values())
    if most > 2:
        raise ValueError(
            f"pyreft saved {most} interventions at one site and does not say which tokens they edit: pass "
            "positions=..., with as many terms."
        )
    return "l1" if most == 1 else "f1+l1"


def _deal_positions(positions: str | Sequence[str], representations: Sequence[_Representation]) -> list[str]:
    """The expression of every representation."""
    if not isinstance(positions, str):
        if len(positions) != len(representations):
            raise ValueError(
                f"positions names {len(positions)} expressions, but pyreft saved {len(representations)} interventions: "
                "name one for each."
            )
        for expression in positions:
            parse(expression)
        return list(positions)
    terms = [str(term) for term in parse(positions)]
    sites = [representation.key("_") for representation in representations]
    counts = Counter(sites)
    seen: Counter[str] = Counter()
    dealt = []
    for site in sites:
        if counts[site] == 1:
            dealt.append("+".join(terms))
        elif counts[site] == len(terms):
            dealt.append(terms[seen[site]])
        else:
            raise ValueError(
                f"pyreft saved {counts[site]} interventions at one site ({site}), but positions={positions!r} has "
                f"{len(terms)} term(s). Give as many terms, such as 'f2+l2', or a list with one expression for each of "
                f"the {len(sites)} interventions."
            )
        seen[site] += 1
    return dealt


def _read_intervention(file: Path, pyreft_class: str, rank: int | None, act_fn: str | None) -> Intervention:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as a dict of tensors: {type(error).__name__}: {str(error).splitlines()[0]}. "
            "It is damaged, or holds more than weights, which reftune does not load."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} does not hold a dict of tensors, so pyreft did not save it.")
    take = _Taker(file, {key: _wide(value) for key, value in state.items()})
    kind, free = _KINDS[pyreft_class]
    tensors = _TAKE[kind](take, act_fn)
    r, d = tensors["R"].shape
    if rank is not None and r != rank:
        raise ValueError(f"{file} has rank {r}, but config.json says low_rank_dimension={rank}.")
    for name, value in tensors.items():
        expected = (r,) if name == "b" else (r, d)
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{file}: {name} should have the shape {expected} beside R {(r, d)}, not {(*value.shape,)}."
            )
    if kind != free:
        drift = float(orthonormality_error(tensors["R"]))
        if drift > _ORTHONORMAL:
            warnings.warn(
                f"{file.name}: the rows of R are not orthonormal (max |RRᵀ − I| = {drift:.1e}), so this "
                f"{pyreft_class} is loaded as {free!r}, which has the same formula and leaves R as it is.",
                UserWarning,
                stacklevel=3,
            )
            kind = free
            tensors.setdefault("W", torch.zeros(r, d))
    constant = pyreft_class in ("ConsreftIntervention", "LobireftIntervention")
    intervention = intervention_class(kind)(
        embed_dim=d, low_rank_dimension=r, act_fn=None if constant else act_fn, init_weights=False
    )
    with torch.no_grad():
        for name, value in tensors.items():
            getattr(intervention, name).copy_(value)
    return intervention


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value


class _Taker:
    """A state dict that names its file in the error for a missing key."""

    def __init__(self, file: Path, state: dict[str, Tensor]) -> None:
        self.file = file
        self.state = state

    def __call__(self, *names: str) -> Tensor:
        for name in names:
            if name in self.state:
                return self.state[name]
        raise ValueError(
            f"{self.file} has no tensor {' or '.join(map(repr, names))}; it has {', '.join(sorted(self.state))}. "
            "Its weights do not belong to the intervention that config.json names."
        )

    def matrix(self, *names: str) -> Tensor:
        value = self(*names)
        if value.ndim != 2:
            raise ValueError(f"{self.file}: {names[0]} should be a matrix, but has the shape {tuple(value.shape)}.")
        return value


def _rotation(take: _Taker) -> Tensor:
    """R (r, d): pyreft's `rotate_layer` (d, r) transposed, or computed from what torch's parametrisation kept."""
    if "rotate_layer" in take.state:
        return take.matrix("rotate_layer").mT.contiguous()
    prefix = "rotate_layer.parametrizations.weight."
    raw = take.matrix(f"{prefix}original")
    base = take.matrix(f"{prefix}0.base")
    d, r = raw.shape
    if tuple(base.shape) != (d, d) or r > d:
        raise ValueError(f"{take.file}: the rotation ({d}, {r}) does not fit its base {tuple(base.shape)}.")
    # torch.nn.utils.parametrizations.orthogonal: an exponential for a square weight, else Householder reflections
    if r == d:
        lower = raw.tril()
        return (base @ torch.linalg.matrix_exp(lower - lower.mT)).mT.contiguous()
    reflections = raw.tril(diagonal=-1)
    rows = torch.linalg.householder_product(reflections, 2.0 / (1.0 + (reflections * reflections).sum(dim=-2)))
    rows = rows * raw.diagonal().to(torch.int32)
    return (base @ rows).mT.contiguous()


def _source(take: _Taker) -> dict[str, Tensor]:
    return {
        "W": take.matrix("learned_source.weight", "weight"),
        "b": take("learned_source.bias", "bias"),
    }


def _noreft(take: _Taker, act_fn: str | None) -> dict[str, Tensor]:
    """pyreft's has a second bias: W₂ᵀ(f(W₁h + b₁) − W₂h − b₂), which is b = b₁ − b₂ where f is the identity."""
    tensors = {"R": take.matrix("proj_layer.weight"), **_source(take)}
    second = take.state.get("proj_layer.bias")
    if second is not None:
        if act_fn not in (None, "linear") and bool((second != 0).any()):
            raise ValueError(
                f"{take.file}: this NoreftIntervention has add_bias=True, and with act_fn={act_fn!r} its second bias "
                "cannot be folded into the first. Only act_fn=None can be loaded."
            )
        if second.shape != tensors["b"].shape:
            raise ValueError(f"{take.file}: its two biases have the shapes {second.shape} and {tensors['b'].shape}.")
        tensors["b"] = tensors["b"] - second
    return tensors


_TAKE: dict[str, Callable[[_Taker, str | None], dict[str, Tensor]]] = {
    "loreft": lambda take, act_fn: {"R": _rotation(take), **_source(take)},
    "direft": lambda take, act_fn: {"R": _rotation(take), **_source(take)},
    "consreft": lambda take, act_fn: {"R": _rotation(take), "b": take("learned_source")},
    "lobireft": lambda take, act_fn: {"R": _rotation(take), "b": take("learned_source")},
    "noreft": _noreft,
    # the bias of pyreft's proj_layer, if any, is in no formula of its
    "nodireft": lambda take, act_fn: {"R": take.matrix("proj_layer.weight"), **_source(take)},
}
