"""`ReftModel`: PEFT's tuner for ReFT. It puts a `ReftLayer` at every site and a session on the model; nothing else of
the base model's module tree or parameter names changes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import _set_adapter
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..interventions.slim import pack
from ..sites import Site, find_sites
from . import compatibility, with_lora
from .baking import Baked, bake
from .building import build, taken_at
from .config import ReftConfig
from .counting import TrainableParameters, trainable_parameters
from .generate import bind, unbind
from .hooks import CHILD, attach, detach, detach_all, watch_checkpointing, watch_model, watch_training, watch_whole
from .layer import ReftLayer, shared
from .merging import merge as merge_adapters
from .parts import expect_others, make_room, others_at_sites, train_only, use_subspaces
from .registration import PREFIX
from .session import ATTRIBUTE, Session
from .truncation import truncate_state


class ReftModel(BaseTuner):
    """The base model with ReFT adapters; made by `get_peft_model`, `get_reft_model` or `PeftModel.from_pretrained`."""

    prefix: str = PREFIX
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, Any] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        compatibility.check_new(model, adapter_name)  # before PEFT puts its config in another one's place
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    @property
    def session(self) -> Session:
        return self.model.__dict__[ATTRIBUTE]  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.session.through_wrapper():
            return self.model(*args, **kwargs)

    def trainable_parameters(self) -> TrainableParameters:
        """Prints as "32,772 parameters, 65.5 kB in bfloat16, 0.0005% of the model"."""
        return trainable_parameters(self.model)

    # -- injection -----------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Resolve the sites, add the interventions, attach the hooks. On an error the model is as it was before."""
        kwargs.pop("state_dict", None)  # the config says where to edit
        config: ReftConfig = self.peft_config[adapter_name]
        try:
            with_lora.add(model, adapter_name, config, self.active_adapters, self.peft_config)
            self._plan(model, adapter_name, config)
            mix = self.session.mix
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self.session.mix = mix  # PEFT has set the active adapters anew
        except Exception:
            del self.peft_config[adapter_name]
            self._forget(model, adapter_name)
            if not self.peft_config:
                detach_all(model)
                unbind(model)
            raise
        session = self.session
        if config.from_file:
            session.unloaded.add(adapter_name)
        layers = [layer for layer in session.layers if adapter_name in layer.groups]
        session.interventions[adapter_name] = tuple(i for layer in layers for i in layer.interventions(adapter_name))
        session.positions[adapter_name] = shared(tuple({p: None for la in layers for p, _ in la.groups[adapter_name]}))
        for path in self._sites.keys() - set(session.watched):
            self._watch(model, path)
            session.watched.append(path)
        watch_whole(model, session)
        if adapter_name not in self.active_adapters:
            pack(session.interventions[adapter_name])
            config.slim()

    def _plan(self, model: nn.Module, adapter_name: str, config: ReftConfig) -> None:
        """Find the sites of every edit before anything is touched: `self._sites` maps a path to what goes there."""
        session: Session = model.__dict__.setdefault(ATTRIBUTE, Session(model))
        session.shape = shape = session.shape or compatibility.base_shape(model)  # one for all adapters
        if config.from_file and config.base_model_shape is not None:
            compatibility.check_same(config.base_model_shape, shape, adapter_name)
        compatibility.check_saved_modules(model, config.modules_to_save or ())
        config.base_model_shape = shape
        self._sites: dict[str, list[tuple[Site, dict[str, Any]]]] = {}
        for edit in config.edits():
            wanted = str(edit["layers"]), str(edit["component"])
            if wanted not in session.sites:
                session.sites[wanted] = find_sites(model, edit["layers"], edit["component"])
            for site in session.sites[wanted]:
                compatibility.check_decoder(model, site, edit["positions"])
                self._sites.setdefault(site.path, []).append((site, edit))
        config.target_modules = sorted(self._sites)
        compatibility.check_names(adapter_name, config.target_modules, with_lora.paths(model), self.peft_config)
        if with_lora.lora_of(model) is not None:
            with_lora.check_sites(model, self._sites)
        every = [site for at in self._sites.values() for site, _ in at]
        self._others = others_at_sites(model, config, adapter_name, every, self.peft_config)

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
            others = self._others.get((site.path, site.where))
            taken = taken_at(others, str(site)) if others else None
            interventions = {
                group: build(edit, self.model, target, site, taken) for group in peft_config.groups(edit["positions"])
            }
            if peft_config.orthogonal_to and peft_config.from_file:
                expect_others(interventions.values())
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
            watch_training(model)
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
        keep |= {id(p) for p in with_lora.lora_parameters(model)}
        for parameter in model.parameters():
            if id(parameter) not in keep:
                parameter.requires_grad = False

    def _check_new_adapter_config(self, config: ReftConfig) -> None:
        """PEFT's check is about biases of the base model; ours is the intervention's own."""

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are made in fp32 (fp64 for an fp64 base) and stay so: R in bf16 is orthonormal to 1e-3 at best."""
        self.session.needs_wrapper = True  # only a PeftModel asks for this; transformers' own add_adapter has none
        if adapter_name not in self.active_adapters:  # called again when the weights are loaded
            for intervention in self.session.interventions.get(adapter_name, ()):
                intervention.slim()

    # -- use -----------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, in this order; the time does not depend on how many others there are."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if any(config.modules_to_save or config.trainable_token_indices for config in self.peft_config.values()):
            for module in self.model.modules():  # all of them before the first changes
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.check_set_adapter(names)
            _set_adapter(self.model, names, inference_mode=inference_mode)
        for layer in self.session.layers:
            layer.set_adapter(names, inference_mode=inference_mode)
        self.session.active, self.session.mix = names, None
        self.active_adapter = adapter_name
        with_lora.activate(self.model, names, self.peft_config, inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        if enabled:  # PEFT makes all of an active adapter trainable
            with_lora.activate(self.model, self.active_adapters, self.peft_config)

    def disable_adapter_layers(self) -> None:
        """Disable all adapters: the model is the base model again, bit for bit."""
        self._enable_adapter_layers(enabled=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; sites that no adapter edits any more are freed."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        del self.peft_config[adapter_name]
        before, mix = self.active_adapters, self.session.mix
        active = [name for name in before if name != adapter_name]
        self._forget(self.model, adapter_name)
        if not active and self.peft_config:
            active = [next(iter(self.peft_config))]
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._get_available_adapters():
                trains = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
                own = [name for name in active if name in module._get_available_adapters()]  # PEFT takes one at most
                module.delete_adapter(adapter_name, new_active_adapters=own)
                for parameter, requires_grad in trains if active == before else ():
                    parameter.requires_grad_(requires_grad)
        if active != before:
            self.set_adapter(active)
        self.session.mix = None if mix is None or adapter_name in mix.strengths else mix

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "sum",
        rank: int | None = None,
    ) -> Baked:
        """Bake adapters into a new one that computes the same: "sum", h + Σ wᵢ Δᵢ(h), or "sequence", each editing what
        the one before it left, h ← h + wᵢ Δᵢ(h). Ranks add up; `rank` asks for the nearest edit of that rank instead.

        Returns the ranks and the relative errors of the edits (0 where exact, see `Form.nearest`). Raises ValueError,
        with nothing added, for kinds that are not affine, for a sum of edits whose tokens overlap without being the
        same, for unknown adapters, and for weights that are not finite.
        """
        return bake(self, adapters, weights, adapter_name, combination_type, rank)

    def train_only(self, subspaces: Any = None, stage: Any = None, adapter_name: str | None = None) -> None:
        """Train one part of an adapter (the active ones if None): some of its subspaces, `train_only(subspaces="b")`,
        or stages of its stack, `train_only(stage=1)`. The other parts are frozen, bit for bit; without arguments
        everything is trained again. Call it before the optimiser is made. ValueError for parts that are not there.
        """
        train_only(self.session, self._names(adapter_name), subspaces, stage)

    def set_subspaces(self, names: Any = None, adapter_name: str | None = None) -> None:
        """Let these subspaces of an adapter act (the active ones if None) wherever a call does not choose with
        `subspaces=`; None for all. ValueError for subspaces that are not there."""
        use_subspaces(self.session, self._names(adapter_name), names)

    def train_parts(self, parts: str = "both", adapter_name: str | None = None) -> None:
        """Of an adapter with a LoRA part, train "lora", "reft" or "both"."""
        with_lora.train_parts(self.model, parts, self._names(adapter_name), self.peft_config)

    def disable_lora(self) -> AbstractContextManager[None]:
        """`with model.disable_lora():` ReFT acts alone."""
        return with_lora.without_lora(self.model)

    def disable_reft(self) -> AbstractContextManager[None]:
        """`with model.disable_reft():` LoRA acts alone."""
        return with_lora.without_reft(self.model)

    def _names(self, adapter_name: str | None) -> list[str]:
        names = self.active_adapters if adapter_name is None else [adapter_name]
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"There is no adapter {name!r}; this model has {sorted(self.peft_config)}.")
        return names

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
            session.forget(adapter_name)
            edited = {id(target) for target in model.modules() if any(c in target._modules for c in CHILD.values())}
            session.watched = [path for path in session.watched if id(model.get_submodule(path)) in edited]
        with_lora.remove(model, adapter_name)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            merge_adapters(self, adapter_names, safe_merge)
        with_lora.unload(self.model)
        for name in list(self.peft_config):
            self._forget(self.model, name)
        for module in self.model.modules():
            for child, wrapper in list(module.named_children()):
                if isinstance(wrapper, AuxiliaryTrainingWrapper):
                    setattr(module, child, wrapper.original_module)
        detach_all(self.model)
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
        with_lora.check_not_mixed(self.model, names)
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
        state = compatibility.with_all_tensors(model, adapter_name, state)
        return compatibility.with_orthonormal_rows(model, adapter_name, state)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The adapter's name stands after the group, also before the parts of an intervention."""
        found = compatibility.OURS.search(key)
        if not found:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return key[: found.end()] + key[found.end() :].replace(f".{adapter_name}.", ".", 1)

    @classmethod
    def _get_learnable_bias_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}  # `bias` is the intervention's b, which is among its parameters

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        if config.rows_kept is not None:
            state_dict = truncate_state(state_dict, config.rows_kept)
        undo = make_room(model, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        tuner: Any = getattr(model, "base_model", None)
        unloaded = tuner.session.unloaded if isinstance(tuner, ReftModel) else set()
        try:
            compatibility.check_keys(model, adapter_name, remapped)
            with_lora.check_keys(model, adapter_name, remapped)
        except ValueError:
            undo()
            if adapter_name in unloaded:  # made for these weights; any other one stays as it was
                if len(tuner.peft_config) > 1:
                    tuner.delete_adapter(adapter_name)
                else:
                    tuner.unload()
                    tuner.peft_config.clear()
            raise
        unloaded.discard(adapter_name)
        return compatibility.as_made(model, adapter_name, remapped)
