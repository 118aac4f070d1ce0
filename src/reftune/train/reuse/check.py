"""The first batch computed both ways: with reuse and plainly, on two of its rows.

What makes reuse exact is told from the structure of a model; a model may still do what no structure shows. Loss and
gradients are compared, since at the start an edit of zero moves no loss, wherever it is made.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .engine import Reuse
from .plan import base_of, randomness
from .window import IGNORE

# relative: of the loss, and of all gradients together; kept states are rounded in another order
_TOLERANCE = {torch.float64: (1e-6, 1e-5), torch.float32: (1e-3, 1e-2)}
_LOW = (5e-2, 0.3)

# model, inputs, tokens with a label → the loss
LossOf = Callable[[Any, dict[str, Any], Tensor], Tensor]


def of_the_model(model: Any, inputs: dict[str, Any], items: Tensor) -> Tensor:
    """The loss that the model computes itself."""
    loss: Tensor = model(**inputs).loss
    return loss


def check(
    reuse: Reuse, model: Any, inputs: Mapping[str, Any], keep: bool, loss_of: LossOf = of_the_model
) -> str | None:
    """None if both ways agree on two rows of the batch, else what was found, to go behind "because".

    model: what is called, the PeftModel or what wraps it, in the mode it will run in.
    loss_of: what computes the loss.
    """
    session, base = base_of(reuse.model)
    some = _two_rows(inputs)
    learns = [p for p in reuse.model.parameters() if p.requires_grad]
    with _same_randomness(session), torch.set_grad_enabled(base.training and torch.is_grad_enabled()):
        try:
            prepared = reuse.prepare(some, keep)
        except Exception as error:
            return _refusal(error)
        if prepared is None:
            return None
        items = (some["labels"] != IGNORE).sum()
        plain = _loss_and_gradients(loss_of(model, dict(some), items), learns)
        try:
            with prepared.active():
                reused = _loss_and_gradients(loss_of(model, prepared.inputs, items), learns)
        except Exception as error:
            return _refusal(error)
    if base.dtype in _TOLERANCE and not _autocasts(reuse, base):
        loss_limit, gradient_limit = _TOLERANCE[base.dtype]
    else:
        loss_limit, gradient_limit = _LOW
    loss = abs(plain[0] - reused[0]) / max(1.0, abs(plain[0]))
    if not loss <= loss_limit and plain[0] == plain[0]:
        return f"the loss of its first rows is {reused[0]:.6g} with it and {plain[0]:.6g} without" + _cause(base)
    size = float(plain[1].norm())
    apart = float((plain[1] - reused[1]).norm()) / size if size > 0 else 0.0
    if not apart <= gradient_limit and size == size:
        return f"the gradients of its first rows differ by {100 * apart:.2g} %" + _cause(base)
    return None


def _two_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first row and the one whose length is most different from it."""
    count = inputs["input_ids"].shape[0]
    mask = inputs.get("attention_mask")
    length = mask.sum(1) if isinstance(mask, Tensor) and mask.dim() == 2 else inputs["input_ids"].new_zeros(count)
    other = int((length - length[0]).abs().argmax())
    rows = [0] if count == 1 else [0, other if other else count - 1]

    def chosen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == count:
            return value[rows]
        return [value[row] for row in rows] if isinstance(value, (list, tuple)) and len(value) == count else value

    return {key: chosen(value) for key, value in inputs.items()}


def _loss_and_gradients(loss: Tensor, learns: list[Tensor]) -> tuple[float, Tensor]:
    if not loss.requires_grad:
        return float(loss), loss.new_zeros(1)
    found = torch.autograd.grad(loss, learns, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for g, p in zip(found, learns, strict=True)]
    return float(loss.detach()), torch.cat([g.double().flatten().cpu() for g in whole])


@contextmanager
def _same_randomness(session: Any) -> Any:
    """Dropout on edits is off, and the random state is afterwards what it was."""
    edits = [m for name in session.names for m in session.interventions.get(name, ()) if m.training]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        for module in edits:
            module.training = False
        try:
            yield
        finally:
            for module in edits:
                module.training = True


def _refusal(error: Exception) -> str:
    what = str(error).partition("\n")[0][:200]
    return f"this model, or its loss, does not take it ({type(error).__name__}: {what})"


def _cause(base: Any) -> str:
    """Smaller batches draw other numbers."""
    random = randomness(base) if base.training else None
    return f" (the base model is random in training mode: {random})" if random else ""


def _autocasts(reuse: Reuse, base: Any) -> bool:
    with reuse.autocast():
        return torch.is_autocast_enabled(next(base.parameters()).device.type)
