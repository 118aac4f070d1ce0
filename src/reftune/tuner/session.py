"""The session of a model with ReFT: opens a `Batch` when a forward pass begins, closes it when it ends or fails.

A pre-hook on the model (and on the inner models that may be called by themselves) reads the inputs; the layers below
ask `session.batch`. `generate` says beforehand which columns are the prompt; a prompt is remembered on the cache it
was read into, so that decoding by hand works too.
"""

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..interventions import retract_all
from ..interventions.choice import Choice
from ..positions import parse
from ..sites import Site
from .batch import Batch, Inputs, Prompt, call_arguments
from .caches import cache_among, cache_of
from .mix import Mix
from .unplaced import CONTINUOUS, check_everywhere, is_paged

ATTRIBUTE = "_reft_session"


class _State:
    """What is running in one thread."""

    def __init__(self) -> None:
        self.open: list[int] = []  # ids of the modules whose forward is running, outermost first
        self.batch: Batch | None = None
        self.idle = False  # a pass is running, and it is known that it edits nothing
        self.prompt: Prompt | None = None  # of the `generate` that is running
        self.generating = False  # one is running, with a prompt to tell or without (an encoder-decoder's)
        self.subspaces: Any = None  # of the same
        self.wrapped = False  # the pass came through the PeftModel
        self.adapter_names: list[str] | None = None
        self.mix: Mix | None = None


class _Threads(threading.local):
    """A state per thread, so that a server may generate from several. `torch.compile` forgets what is written to a
    threading.local, not what is written to an object in one."""

    def __init__(self) -> None:
        self.state = _State()


class Session:
    """What the ReFT layers of one base model share."""

    def __init__(self, model: nn.Module) -> None:
        self.threads = _Threads()
        self.unloaded: set[str] = set()  # adapters made from a file's config, whose weights are still to come
        self.positions: dict[str, tuple[str, ...]] = {}  # adapter → its expressions
        self.layers: list[Any] = []  # the ReftLayers of the model
        self.shape: dict[str, Any] = {}
        self.sites: dict[tuple[str, str], list[Site]] = {}  # (layers, component) → the base's sites, which stay
        self.watched: list[str] = []  # paths of modules with a layer, whose surroundings are watched
        self.active: list[str] = []
        self.mix: Mix | None = None  # takes the place of `active` where there is one
        self.enabled = True
        self.needs_wrapper = False
        self.looks = 16  # batches whose labels are looked at for several answers
        self.interventions: dict[str, tuple[Any, ...]] = {}
        config = getattr(model, "config", None)
        generates = getattr(model, "can_generate", None)
        # Labels mark the answer only in a causal language model: token classification labels its prompt.
        self.reads_labels = bool(callable(generates) and generates()) and not getattr(
            config, "is_encoder_decoder", False
        )
        self.signatures: dict[type, list[str]] = {}

    # Copied with the model, but what is running stays with the original.
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("threads", "signatures")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.threads = _Threads()
        self.signatures = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session":
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__({k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items()})
        return twin

    @property
    def state(self) -> _State:
        """This thread's."""
        return self.threads.state

    @property
    def batch(self) -> Batch | None:
        return self.state.batch

    @property
    def editing(self) -> bool:
        """Whether any adapter is active and enabled."""
        return self.enabled and bool(self.names)

    @property
    def names(self) -> list[str]:
        """The adapters that edit: those of the rows of a mixed batch, of a mix, or the active ones."""
        if self.state.adapter_names is not None:
            return [name for name in dict.fromkeys(self.state.adapter_names) if name != "__base__"]
        mix = self.state.mix or self.mix
        return self.active if mix is None else list(mix.active())

    def forget(self, adapter_name: str) -> None:
        """Keep nothing of an adapter whose interventions are gone."""
        self.positions.pop(adapter_name, None)
        self.interventions.pop(adapter_name, None)
        self.unloaded.discard(adapter_name)
        self.active = [name for name in self.active if name != adapter_name]
        self.layers = [layer for layer in self.layers if layer.groups]

    @contextmanager
    def mixing(self, mix: Mix) -> Iterator[None]:
        """Edit with a mix of adapters in here, in this thread."""
        before, self.state.mix = self.state.mix, mix
        try:
            yield
        finally:
            self.state.mix = before

    @contextmanager
    def through_wrapper(self) -> Iterator[None]:
        """Calls of the base model in here come from its PeftModel."""
        before, self.state.wrapped = self.state.wrapped, True
        try:
            yield
        finally:
            self.state.wrapped = before

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], top: bool) -> dict[str, Any]:
        """Begin a forward pass of `module`; returns its keyword arguments without ours."""
        state = self.state
        if top or id(module) in state.open:  # whatever a broken-off pass left behind
            state.open.clear()
        state.open.append(id(module))
        prompt_mask, subspaces = kwargs.get("prompt_mask"), kwargs.get("subspaces", state.subspaces)
        if "prompt_mask" in kwargs or "subspaces" in kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k not in ("prompt_mask", "subspaces")}
        if len(state.open) > 1:
            return kwargs
        editing = self.editing
        state.batch = self._batch(module, args, kwargs, prompt_mask) if editing else None
        state.idle = state.batch is None or state.batch.nothing
        if state.batch is not None and not state.idle:
            state.batch.choice = Choice() if subspaces is None else self._choice(subspaces, state.batch)
        if editing and torch.is_grad_enabled() and module.training:
            self.unloaded.difference_update(self.names)  # trained, they are no longer those of a file
            self._retract()
        return kwargs

    def close(self, module: nn.Module, kwargs: dict[str, Any], output: Any) -> None:
        """End it, also after an exception (output None): a window left behind would edit nothing, silently."""
        state = self.state
        if id(module) not in state.open:
            return
        del state.open[state.open.index(id(module)) :]
        if state.open:
            return
        batch, state.batch, state.idle = state.batch, None, False
        if batch is None or output is None or batch.inputs.shape is None:
            return
        prompt, past = batch.prompt, batch.inputs.past
        if isinstance(past, Tensor):  # a compiled step: what there is to know of the prompt is known
            return
        cache = cache_among(kwargs.get)
        if cache is None:
            cache = cache_of(output)
        if prompt is None and cache is not None and batch.inputs.all_prompt():
            prompt = Prompt(columns=past + batch.inputs.shape[1])
            remember(cache, prompt)
        if prompt is not None:
            prompt.seen = past + batch.inputs.shape[1]
            if cache is not None and prompt.seen >= prompt.columns:
                prompt.read = True
                if prompt is state.prompt:
                    prompt.cache = cache

    def _batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], prompt_mask: Any) -> Batch:
        get = call_arguments(self._names(module), args, kwargs)
        state = self.state
        ids, embeds, cache = get("input_ids"), get("inputs_embeds"), cache_among(get)
        mask, position_ids = get("attention_mask"), get("position_ids")
        if isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.dim() == 3 and mask.shape == ids.shape:
            # multiple choice: the model, too, takes (B, choices, L) for (B * choices, L)
            ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)
        tokens = ids if isinstance(ids, Tensor) and ids.dim() == 2 else embeds
        shape = (tokens.shape[0], tokens.shape[1]) if isinstance(tokens, Tensor) and tokens.dim() >= 2 else None

        names, mix = state.adapter_names, state.mix or self.mix
        repeats = state.generating or ids is not get("input_ids")  # its rows for beams; for choices
        if names is not None and not repeats:
            given = tokens if shape else get(getattr(module, "main_input_name", ""))  # else images or audio
            if isinstance(given, Tensor) and len(names) != len(given):
                raise ValueError(
                    f"adapter_names names adapters for {len(names)} rows, but the batch has {len(given)}: name one for "
                    "each."
                )
        if is_paged(cache):
            check_everywhere(CONTINUOUS, self.names, self.layers)
            return Batch(Inputs(shape, device=tokens.device if isinstance(tokens, Tensor) else None), None, names, mix)

        running = state.prompt
        if running is not None and running.is_beside(cache):
            running = None  # the negative prompt, read and decoded in a cache of its own as by hand
        prompt = running
        if prompt is None and cache is not None:
            prompt = getattr(cache, "_reft_prompt", None)
            if prompt is not None and not torch.compiler.is_compiling():
                held = _counted(cache, get("cache_position"))
                if held is not None and int(held) < prompt.columns and prompt.read:
                    prompt = None  # emptied, or cropped into its prompt: what comes now belongs to a new one
        elif prompt is not None and prompt.read and cache is not prompt.cache:
            prompt.read = False  # without a cache every pass reads the prompt again
        if prompt is not None and prompt.read and self._only_prompt_terms():
            return Batch(Inputs(shape, past=prompt.columns), prompt, names, mix, nothing=True)

        if torch.compiler.is_compiling() and running is not None and prompt is not None and prompt.read:
            number = _past_in_graph(cache, prompt, get("cache_position"), self._counts_answers())
            if number is not None:
                return Batch(Inputs(shape, past=number), prompt, names, mix)
        past = _past(cache, prompt, get("cache_position"))
        if past == 0 and running is None:
            prompt = None  # an emptied cache begins a new prompt
        labels = get("labels") if self.reads_labels else None
        if not (isinstance(labels, Tensor) and shape is not None and tuple(labels.shape) == shape):
            labels = None
        if isinstance(prompt_mask, Tensor) and shape is not None and tuple(prompt_mask.shape) != shape:
            raise ValueError(
                f"prompt_mask has the shape {tuple(prompt_mask.shape)}, but the model was called with {shape} tokens. "
                "It must hold a 1 for every prompt token and a 0 for every other one, (batch, tokens)."
            )
        two_d = isinstance(position_ids, Tensor) and position_ids.dim() == 2 and shape is not None
        keep = get("logits_to_keep")
        inputs = Inputs(
            shape=shape,
            mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
            labels=labels if running is None else None,
            prompt_mask=prompt_mask if running is None else None,
            position_ids=position_ids if two_d and position_ids.shape[1] == shape[1] else None,  # type: ignore[index]
            past=past,
            device=tokens.device if isinstance(tokens, Tensor) else None,
            keep=keep if isinstance(keep, int) else 0,
            hears=module if hasattr(module, "_get_feature_vector_attention_mask") else None,
        )
        if inputs.labels is not None or inputs.prompt_mask is not None:
            prompt = None
        batch = Batch(inputs, prompt, names, mix)
        if running is not None and shape is not None and not torch.compiler.is_compiling():
            batch.places = inputs.layout(prompt)  # here, for a compiled `forward` would be compiled anew for each step
        return batch

    def _choice(self, subspaces: Any, batch: Batch) -> Choice:
        """What was chosen, checked, and repeated as generate repeats its rows for beams."""
        rows = batch.inputs.shape[0] if batch.inputs.shape else None
        several = isinstance(subspaces, (list, tuple)) and bool(subspaces) and self.state.prompt is not None
        if rows is not None and several and rows % len(subspaces) == 0:
            subspaces = [entry for entry in subspaces for _ in range(rows // len(subspaces))]
        choice = Choice(subspaces)
        modules = (module for name in self.names for module in self.interventions.get(name, ()))
        choice.check({name for module in modules for name in getattr(module, "subspaces", ())}, rows)
        return choice

    def _only_prompt_terms(self) -> bool:
        return all(t.in_prompt for name in self.names for p in self.positions.get(name, ()) for t in parse(p))

    def _counts_answers(self) -> bool:
        return any(t.counts_answer for name in self.names for p in self.positions.get(name, ()) for t in parse(p))

    def _names(self, module: nn.Module) -> list[str]:
        cls = type(module)
        if cls not in self.signatures:
            self.signatures[cls] = list(inspect.signature(cls.forward).parameters)[1:]
        return self.signatures[cls]

    def _retract(self) -> None:
        """All R of the active adapters, put right in one batched call."""
        retract_all(module for name in self.names for module in self.interventions.get(name, ()))


def _past(cache: Any, prompt: Prompt | None, places: Any = None) -> int:
    """Columns that the cache holds already. `places` (columns,) is where this pass's stand, if the call says so."""
    length = int(_length(cache, places))
    if length or cache is None or prompt is None:
        return length
    its_own = prompt.cache is cache or getattr(cache, "_reft_prompt", None) is prompt
    return prompt.seen if its_own else 0  # a recurrent state does not count its columns


def _past_in_graph(cache: Any, prompt: Prompt, places: Any, exactly: bool) -> Tensor | None:
    """The same for a compiled step after the prompt, as a tensor (): a number would be part of the graph, and every
    step's another. Not `exactly`: that the prompt is over is all that matters. None if the cache cannot tell."""
    if not exactly and isinstance(places, Tensor):
        return prompt.end
    length = _length(cache, places)
    if isinstance(length, Tensor):
        return length.clone() if exactly else prompt.end  # a clone, for the cache counts on in place
    return prompt.end if length > 0 and not exactly else None


def _length(cache: Any, places: Any) -> int | Tensor:
    """Columns that the cache counts, as `_past`; 0 if it does not."""
    length = _counted(cache, places)
    return 0 if length is None else length


def _counted(cache: Any, places: Any) -> int | Tensor | None:
    """The same, None if it does not count: no cache, a tuple, or a recurrent state alone."""
    count = getattr(cache, "get_seq_length", None)
    try:
        length: int | Tensor | None = None if count is None else count()
    except ValueError:  # how a cache without an attention layer says so
        return None
    if not isinstance(length, Tensor):
        return length if length is None else int(length)
    # transformers 5.0 counts a static cache's keys that are not zero: padding's may be
    return places[0] if isinstance(places, Tensor) and places.dim() == 1 and places.numel() else length


def remember(cache: Any, prompt: Prompt) -> None:
    """Let a cache say, to who decodes on with it, which prompt it holds."""
    with contextlib.suppress(AttributeError):  # None, or a tuple: decoding by hand then needs prompt_mask
        cache._reft_prompt = prompt
