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

from ..interventions import NodireftIntervention
from ..interventions.reads import Reads
from .session import ATTRIBUTE, Session


def initialize_reft_weights(model: Any, dataloader: Iterable[Mapping[str, Any]], adapter_name: str = "default") -> None:
    """Set W and b of an untrained NodiReFT adapter from the loss's gradient over a few batches, in place.

    W's rows become the r main directions in which the hidden states of a site move together with the gradient, scaled
    to read as much as the random ones did, and b = −W·(their mean); R stays 0. A site whose states do not move keeps
    its random rows. Costs two training steps a batch; some 32 rows do. In a run of several processes call it before
    the model is wrapped, with the same batches in each.

    Args:
        model: a `PeftModel` (or the tuner) whose active adapters include `adapter_name`.
        dataloader: batches as the model takes them, with labels; gone through twice, so not a generator.

    Raises:
        ValueError: the adapter is not there or not active, is of another kind, has learned already (R ≠ 0), is not
            trainable, or the batches give no finite loss, reach none of its tokens, or end after one pass. Then
            nothing has changed.
    """
    reads = {one: Reads(one.W, one.b is not None, one.others_write) for one in _interventions(model, adapter_name)}
    learned = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in learned]
    modes = {module: module.training for module in model.modules()}
    handles = [one.register_forward_hook(partial(_watch, sums)) for one, sums in reads.items()]
    try:
        for parameter in learned:
            parameter.grad = None  # so that nothing is added to what was there
        model.train()  # as training does it: gradient checkpointing, where it is on
        for module in modes:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # which would remember what it has seen
                module.eval()
        with _same_random_numbers(model):
            seen = _backward(model, dataloader)
            for sums in reads.values():
                with _in_fp32(sums):
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
    if not all(bool(sums.product.isfinite().all()) for sums in reads.values()):
        raise ValueError(
            "The loss over these batches is finite and its gradient is not: look for what overflows, in a float16 "
            "base most likely."
        )
    for one, sums in reads.items():
        with _in_fp32(sums):
            _put(one, *sums.start())


def _interventions(model: Any, adapter_name: str) -> list[NodireftIntervention]:
    session = next((m.__dict__[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in m.__dict__), None)
    if not isinstance(session, Session) or adapter_name not in session.interventions:
        known = ", ".join(map(repr, session.interventions)) if isinstance(session, Session) else ""
        raise ValueError(f"There is no ReFT adapter {adapter_name!r} in this model. Its adapters: {known or 'none'}.")
    if not session.enabled:
        raise ValueError("The model's adapters are disabled: call model.enable_adapter_layers() first.")
    if adapter_name not in session.names:
        raise ValueError(f"The adapter {adapter_name!r} is not active: call model.set_adapter({adapter_name!r}) first.")
    if (session.state.mix or session.mix) is not None:
        raise ValueError("Adapters are composed here. Leave the composition, then choose where one of them reads.")
    found: list[NodireftIntervention] = []
    for one in session.interventions[adapter_name]:
        if not isinstance(one, NodireftIntervention):
            raise ValueError(
                f"{type(one).__name__} has no start of this kind, which is plain NodiReFT's: it writes nothing at "
                'first, so what it reads can be chosen freely. Take intervention="nodireft" without stack and '
                "subspaces, or leave its own start."
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


def _watch(sums: Reads, module: nn.Module, args: tuple[Any, ...], edited: Tensor) -> Tensor | None:
    """A forward hook: the states and their gradient are added when the backward pass reaches them."""
    return _Tap.apply(edited, args[0], sums) if edited.requires_grad else None


class _Tap(torch.autograd.Function):
    """edited, as it is. h is saved as autograd saves, so that gradient checkpointing does not keep it either."""

    @staticmethod
    def forward(ctx: Any, edited: Tensor, h: Tensor, sums: Reads) -> Tensor:
        ctx.save_for_backward(h)
        ctx.sums = sums
        return edited.view_as(edited)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (h,) = ctx.saved_tensors
        with _in_fp32(ctx.sums):
            ctx.sums.add(h.reshape(-1, h.shape[-1]), g.reshape(-1, g.shape[-1]))
        return g, None, None


def _in_fp32(sums: Reads) -> torch.autocast:
    """Whatever the passes are computed in, the sums and what is made of them are fp32."""
    return torch.autocast(sums.w.device.type, enabled=False)


def _backward(model: Any, batches: Iterable[Mapping[str, Any]]) -> int:
    """One pass over the batches, forward and backward, every label weighing alike; how many batches there were."""
    count = 0
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    for batch in batches:
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.enable_grad():
            outputs = model(**inputs)
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
            if loss is None or not bool(torch.isfinite(loss)):
                what = "no loss (do they have labels?)" if loss is None else f"the loss {loss.item()}"
                raise ValueError(f"Where to read is found by the loss's gradient, but the batches give {what}.")
            labels = inputs.get("labels")
            weight = int((labels != -100).sum()) if isinstance(labels, Tensor) else 1
            (loss * max(weight, 1)).backward()
        count += 1
    return count


def _same_random_numbers(model: nn.Module) -> Any:
    """What the passes draw (a base's dropout) is not missing afterwards, on any device of the model."""
    devices = list({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")})
    return torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda")


@torch.no_grad()
def _put(one: NodireftIntervention, w: Tensor, mean: Tensor) -> None:
    one.W.copy_(w)
    one.put_source_right_()  # to rounding: w keeps out of other adapters already
    if one.b is not None:
        one.b.copy_(-(one.W.float() @ mean))
