"""`initialize_reft_weights`: NodiReFT starts by reading what the loss's gradient asks for, instead of at random.

    model = get_reft_model(base, ReftConfig(intervention="nodireft", ...))
    reftune.initialize_reft_weights(model, batches)    # some batches of the training data, with labels
    Trainer(model, ...).train()

What is written still starts at R = 0, so the model's outputs do not change; see `interventions.reads` for the maths.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..interventions import Intervention, NodireftIntervention
from ..interventions.reads import Reads
from .session import ATTRIBUTE, Session


def initialize_reft_weights(model: Any, dataloader: Iterable[Mapping[str, Any]], adapter_name: str = "default") -> None:
    """Set W and b of an untrained NodiReFT adapter from the loss's gradient over a few batches, in place.

    W's rows become the r main directions in which the hidden states of a site move together with the gradient, scaled
    to read as much as the random ones did, and b = −W·(their mean); R stays 0. Costs two training steps a batch; some
    32 rows do. In a run of several processes call it before the model is wrapped, with the same batches in each.

    Args:
        model: a `PeftModel` (or the tuner) whose active adapters include `adapter_name`.
        dataloader: batches as the model takes them, with labels; gone through twice, so not a generator.

    Raises:
        ValueError: the adapter is not there or not active, is of another kind, has learned already (R ≠ 0), is not
            trainable, or the batches give no finite loss, reach none of its tokens, or end after one pass.
    """
    reads = {one: Reads(one.W) for one in _interventions(model, adapter_name)}
    learned = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in learned]
    modes = {module: module.training for module in model.modules()}
    handles = [one.register_forward_hook(partial(_watch, sums)) for one, sums in reads.items()]
    devices = [p.device for p in learned[:1] if p.device.type != "cpu"]
    try:
        for parameter in learned:
            parameter.grad = None  # so that nothing is added to what was there
        model.train()  # as training does it: gradient checkpointing, where it is on
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            seen = _backward(model, dataloader)
            for sums in reads.values():
                sums.turn()
            again = _backward(model, dataloader)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        for module, mode in modes.items():
            module.training = mode
    if seen == 0 or again != seen:
        raise ValueError(
            f"The batches are gone through twice, but there were {seen} and then {again}: pass a list or a DataLoader "
            "of some batches, not a generator."
        )
    if not any(sums.count for sums in reads.values()):
        raise ValueError(f"The adapter {adapter_name!r} edits no token of these batches, so they say nothing of it.")
    for one, sums in reads.items():
        _put(one, *sums.start())


def _interventions(model: Any, adapter_name: str) -> list[NodireftIntervention]:
    session = next((m.__dict__[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in m.__dict__), None)
    if not isinstance(session, Session) or adapter_name not in session.interventions:
        known = ", ".join(map(repr, session.interventions)) if isinstance(session, Session) else ""
        raise ValueError(f"There is no ReFT adapter {adapter_name!r} in this model. Its adapters: {known or 'none'}.")
    if adapter_name not in session.names or not session.enabled:
        raise ValueError(f"The adapter {adapter_name!r} is not active: model.set_adapter({adapter_name!r}) first.")
    found: list[NodireftIntervention] = []
    for one in session.interventions[adapter_name]:
        if not isinstance(one, NodireftIntervention):
            raise ValueError(
                f"{type(one).__name__} has no start of this kind, which is NodiReFT's: it writes nothing at first, so "
                'what it reads can be chosen freely. Take intervention="nodireft", or leave its own start.'
            )
        if one.W.is_meta or not one.W.requires_grad:
            raise ValueError(
                f"The adapter {adapter_name!r} is not trainable here: its weights are "
                f"{'not loaded yet' if one.W.is_meta else 'frozen'}, so they are not set anew."
            )
        if bool(one.R.any()):
            raise ValueError(
                f"The adapter {adapter_name!r} writes something already (R ≠ 0): other reads would change what it has "
                "learned. Call this right after get_reft_model, with init_weights=True."
            )
        found.append(one)
    return found


def _watch(sums: Reads, module: nn.Module, args: tuple[Any, ...], edited: Tensor) -> None:
    """A forward hook: the states and their gradient are added when the backward pass reaches them."""
    h = args[0].detach()
    if edited.requires_grad:
        edited.register_hook(lambda g: sums.add(h.reshape(-1, h.shape[-1]), g.reshape(-1, g.shape[-1])))


def _backward(model: Any, batches: Iterable[Mapping[str, Any]]) -> int:
    """One pass over the batches, forward and backward; how many there were."""
    count = 0
    device = next(model.parameters()).device
    for batch in batches:
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.enable_grad():
            outputs = model(**inputs)
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
            if loss is None or not bool(torch.isfinite(loss)):
                what = "no loss (do they have labels?)" if loss is None else f"the loss {loss.item()}"
                raise ValueError(f"Where to read is found by the loss's gradient, but the batches give {what}.")
            loss.backward()
        count += 1
    return count


@torch.no_grad()
def _put(one: Intervention, w: Tensor, mean: Tensor) -> None:
    one.W.copy_(w)
    one.put_source_right_()  # where W keeps out of other adapters
    if one.b is not None:
        one.b.copy_(-(one.W.float() @ mean))
