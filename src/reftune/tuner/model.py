"""`ReftModel`: PEFT's tuner for ReFT. It puts a `ReftLayer` at every site and a session on the model; nothing else of
the base model's module tree or parameter names changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, _delete_auxiliary_adapter
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..interventions import Intervention, intervention_class
from ..sites import Site, find_sites
from . import compatibility
from .config import ReftConfig
from .generate import bind, unbind
from .hooks import CHILD, attach, detach, watch_checkpointing, watch_model
from .layer import ReftLayer
from .registration import PREFIX
from .session import ATTRIBUTE, Session


@dataclass(frozen=True)
class TrainableParameters:
    """How much is trained: numbers, and out of how many in the model."""

    count: int
    total: int

    def __str__(self) -> str:
        return (
            f"{self.count:,} parameters, {self.count * 2 / 1000:,.1f} kB in bfloat16, "
            f"{100 * self.count / max(self.total, 1):.4f}% of the model"
        )


class ReftModel(BaseTuner):
    """The base model with ReFT adapters; made by `get_peft_model`, `get_reft_model` or `PeftModel.from_pretrained`."""

    prefix: str = PREFIX
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, Any] = {}

    @property
    def session(self) -> Session:
        return self.model.__dict__[ATTRIBUTE]  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.session.through_wrapper():
            return self.model(*args, **kwargs)

    def trainable_parameters(self) -> TrainableParameters:
        """Prints as "32,772 parameters, 65.5 kB in bfloat16, 0.0005% of the model"."""
        seen = {id(p): p for p in self.model.parameters()}.values()
        return TrainableParameters(sum(_numel(p) for p in seen if p.requires_grad), sum(_numel(p) for p in seen))

    # -- injection -----------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Resolve the sites, add the interventions, attach the hooks. On an error the model is as it was before."""
        kwargs.pop("state_dict", None)  # the config says where to edit
        config: ReftConfig = self.peft_config[adapter_name]
        try:
            self._plan(model, adapter_name, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            del self.peft_config[adapter_name]
            self._forget(model, adapter_name)
            raise
        for name, module in list(model.named_modules()):
            if isinstance(module, ReftLayer) and adapter_name in module.groups:
                self.session.interventions.setdefault(adapter_name, []).extend(module.interventions(adapter_name))
                for positions, _ in module.groups[adapter_name]:
                    self.session.positions.setdefault(adapter_name, set()).add(positions)
                self._watch(model, name.rpartition(".")[0])

    def _plan(self, model: nn.Module, adapter_name: str, config: ReftConfig) -> None:
        """Find the sites of every edit before anything is touched: `self._sites` maps a path to what goes there."""
        shape = compatibility.base_shape(model)
        if config.from_file and config.base_model_shape is not None:
            compatibility.check_same(config.base_model_shape, shape, adapter_name)
        config.base_model_shape = shape
        if ATTRIBUTE not in model.__dict__:
            model.__dict__[ATTRIBUTE] = Session(model)
        self._sites: dict[str, list[tuple[Site, dict[str, Any]]]] = {}
        for edit in config.edits():
            for site in find_sites(model, edit["layers"], edit["component"]):
                compatibility.check_decoder(model, site, edit["positions"])
                self._sites.setdefault(site.path, []).append((site, edit))
        config.target_modules = sorted(self._sites)

    def _check_target_module_exists(self, peft_config: ReftConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._sites  # exactly: "layers.1" is not "layers.11"

    def _create_and_replace(
        self,
        peft_config: ReftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        for site, edit in self._sites[current_key]:
            child = CHILD[site.where]
            interventions = {
                group: _build(edit, self.model, target, site) for group in peft_config.groups(edit["positions"])
            }
            layer: Any = getattr(target, child, None)
            if layer is None:
                layer = ReftLayer(self.model.__dict__[ATTRIBUTE])
                layer.train(target.training)
                target.add_module(child, layer)
                attach(target, site.where)
            layer.update_layer(adapter_name, edit["positions"], interventions)
            if adapter_name not in self.active_adapters:
                layer.set_requires_grad(adapter_name, False)

    def _watch(self, model: nn.Module, path: str) -> None:
        """Open the session at the models above the site, and watch the checkpointed blocks around it."""
        session = model.__dict__[ATTRIBUTE]
        parts = path.split(".")
        above = [(model, "")] + [
            (model.get_submodule(p), p) for p in (".".join(parts[:i]) for i in range(1, len(parts)))
        ]
        models = [m for m, _ in above if isinstance(m, PreTrainedModel)] or [model]
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            models = models[-1:]  # two windows: the site's own stack says which
        for inner in models:
            watch_model(inner, session, top=inner is model)
        for block, _ in above:
            if isinstance(block, GradientCheckpointingLayer):
                block.__dict__[ATTRIBUTE] = session
                watch_checkpointing(block)
        bind(model)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        keep: set[int] = set()
        for module in model.modules():
            if isinstance(module, (ReftLayer, AuxiliaryTrainingWrapper)):
                keep |= {id(p) for p in module.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in keep:
                parameter.requires_grad = False

    def _check_new_adapter_config(self, config: ReftConfig) -> None:
        """PEFT's check is about biases of the base model; ours is the intervention's own."""

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are made in fp32 (fp64 for an fp64 base) and stay so: R in bf16 is orthonormal to 1e-3 at best."""
        self.session.needs_wrapper = True  # only a PeftModel asks for this; transformers' own add_adapter has none

    # -- use -----------------------------------------------------------------------------------------------------

    def disable_adapter_layers(self) -> None:
        """Disable all adapters: the model is the base model again, bit for bit."""
        self._enable_adapter_layers(enabled=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; sites that no adapter edits any more are freed."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        del self.peft_config[adapter_name]
        active = [name for name in self.active_adapters if name != adapter_name]
        self._forget(self.model, adapter_name)
        if not active and self.peft_config:
            active = [next(iter(self.peft_config))]
        _delete_auxiliary_adapter(self.model, adapter_name=adapter_name, new_active_adapters=active)
        self.set_adapter(active)
        self.session.active = active

    def _forget(self, model: nn.Module, adapter_name: str) -> None:
        layer: Any
        session = model.__dict__.get(ATTRIBUTE)
        for target in list(model.modules()):
            for child in CHILD.values():
                layer = target._modules.get(child)
                if not isinstance(layer, ReftLayer):
                    continue
                if adapter_name in layer.groups:
                    active: Any = layer.active_adapters
                    layer._active_adapter = [n for n in active if n != adapter_name]
                    layer.delete_adapter(adapter_name)
                if not layer.groups:
                    target._modules.pop(child)
                    if not any(c in target._modules for c in CHILD.values()):
                        detach(target)
        if session is not None:
            session.interventions.pop(adapter_name, None)
            session.positions.pop(adapter_name, None)
            session.active = [n for n in session.active if n != adapter_name]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            raise ValueError(
                "A ReFT adapter edits some tokens only, so it cannot be merged into the weights. Use unload() for the "
                "base model without the adapter."
            )
        for name in list(self.peft_config):
            self._forget(self.model, name)
        for module in self.model.modules():
            detach(module)
            for child, wrapper in list(module.named_children()):
                if isinstance(wrapper, AuxiliaryTrainingWrapper):
                    setattr(module, child, wrapper.unload_and_optionally_merge_module(merge=False))
        unbind(self.model)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around every call through the PeftModel. `adapter_names`, one a row ("__base__" for none): each row is
        edited by its own adapter."""
        state = self.session.state
        names = kwargs.pop("adapter_names", None)
        if names is None:
            with self.session.through_wrapper():
                yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        state.adapter_names = list(names)
        try:
            yield
        finally:
            state.adapter_names = None

    # -- saving and loading ---------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, config: Any, adapter_name: str, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, **kwargs
        )
        # two models may have been made with one config object: what is saved tells of this one
        config.base_model_shape = compatibility.base_shape(
            model.get_base_model() if isinstance(model, PeftModel) else model
        )
        config.target_modules = compatibility.edited_modules(model, adapter_name)
        return compatibility.with_orthonormal_rows(model, adapter_name, state)

    @classmethod
    def _get_learnable_bias_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}  # `bias` is the intervention's b, which is among its parameters

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        try:
            compatibility.check_keys(model, adapter_name, remapped)
        except ValueError:
            tuner = getattr(model, "base_model", None)
            if isinstance(tuner, ReftModel):
                tuner._forget(tuner.model, adapter_name)
                tuner.peft_config.pop(adapter_name, None)
            raise
        return remapped


def _build(edit: dict[str, Any], model: nn.Module, target: nn.Module, site: Site) -> Intervention:
    import copy

    width = compatibility.site_width(model, target, site)
    like = next((p for p in target.parameters() if p.is_floating_point()), None)
    given: Intervention | None = edit["given"]
    if given is not None:
        if width is not None and given.embed_dim != width:
            raise ValueError(
                f"The intervention edits hidden states of width {given.embed_dim}, but those at '{site}' have width "
                f"{width}: build it with embed_dim={width}."
            )
        module = copy.deepcopy(given)
    else:
        if width is None:
            raise ValueError(
                f"The width of the hidden states at '{site}' is not told by the model: pass an intervention that "
                "knows it, LoreftIntervention(embed_dim=...)."
            )
        module = intervention_class(edit["intervention"])(
            embed_dim=width,
            low_rank_dimension=edit["r"],
            act_fn=edit["act_fn"],
            dropout=edit["dropout"],
            bias=edit["bias"],
            init_weights=edit["init_weights"],
            **edit["intervention_kwargs"],
        )
    device = like.device if like is not None and not like.is_meta else None
    dtype = torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32
    return module.to(dtype=dtype) if any(p.is_meta for p in module.parameters()) else module.to(device, dtype)


def _numel(parameter: nn.Parameter) -> int:
    count = parameter.numel() or getattr(parameter, "ds_numel", 0)
    if type(parameter).__name__ == "Params4bit":  # two weights a byte
        return int(count * 2 * getattr(parameter, "element_size", lambda: 1)())
    return int(count)
