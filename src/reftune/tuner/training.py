"""What would go wrong in training without a word, said at the first forward pass instead.

Each check costs a look at a few flags; of the first batches alone the labels are read.
"""

import warnings
from typing import Any

import torch
from torch import nn

from ..positions import parse
from .caches import cache_among
from .session import Session


def check_training(model: nn.Module, session: Session, kwargs: dict[str, Any]) -> None:
    """Check a forward pass of the base model, called with `kwargs`, if it is one to train with.

    Raises RuntimeError if the base model was called directly, or if there is a loss but nothing to train. Warns if
    nothing says where the prompt ends.
    """
    if not (session.editing and model.training and torch.is_grad_enabled()):
        return
    if session.needs_wrapper and not session.state.wrapped:
        raise RuntimeError(
            f"This {type(model).__name__} is the base model: it carries a ReFT adapter, and training it directly "
            "would save the whole model instead of the adapter. Pass the PeftModel that get_reft_model (or "
            "get_peft_model) returned to the trainer."
        )
    told = kwargs.get("labels") is not None or kwargs.get("prompt_mask") is not None
    if told and not _learns(model, session):
        raise RuntimeError(
            f"No parameter of this {type(model).__name__} is trainable: the ReFT adapter "
            f"{', '.join(map(repr, session.names))} was loaded for inference or frozen. To train it on, load it with "
            "PeftModel.from_pretrained(..., is_trainable=True); else call model.eval() or use torch.no_grad()."
        )
    read = cache_among(kwargs.get) is not None or session.state.prompt is not None
    if session.reads_labels and not told and not read and _needs_the_end(session):
        warnings.warn(
            "A training forward without labels and without prompt_mask: every token is taken for prompt, so positions "
            "such as l2 fall on the end of the answer, where generation will not edit. A Trainer takes the labels away "
            "for label smoothing and for compute_loss_func, and TRL before 1.15 for DPO and GRPO: let the collator add "
            "prompt_mask (1 on prompt tokens, reftune.data.ReftDataCollator does). If the whole input is prompt, pass "
            "a prompt_mask of ones.",
            UserWarning,
            stacklevel=2,
        )


def check_turns(model: nn.Module, session: Session) -> None:
    """Warn if a row of one of the first batches to train with holds several answers; called as the pass begins."""
    batch = session.batch
    if not session.looks or batch is None or batch.inputs.labels is None or torch.compiler.is_compiling():
        return
    if not (model.training and torch.is_grad_enabled() and _needs_the_end(session)):
        return
    session.looks -= 1
    places, labelled = batch.inputs.layout(None), batch.inputs.labels != -100
    gap = (places.generated >= 0) & ~labelled.to(places.generated.device)
    again = gap[:, :-1] & (places.generated[:, 1:] >= 0) & ~gap[:, 1:]
    if bool(again.any()):
        session.looks = 0
        warnings.warn(
            f"Row {int(again.any(dim=1).long().argmax())} of this batch has several answers: its labels go on after a "
            "gap of -100. The prompt ends at the first of them, so positions such as l2 are not edited before the "
            "others, where generation edits them. Make a row of each answer, with all that comes before it as its "
            "prompt; positions of f and all alone are the same in both.",
            UserWarning,
            stacklevel=2,
        )


def _learns(model: nn.Module, session: Session) -> bool:
    own = (p for name in session.names for module in session.interventions.get(name, ()) for p in module.parameters())
    return any(p.requires_grad for p in own) or any(p.requires_grad for p in model.parameters())


def _needs_the_end(session: Session) -> bool:
    """Whether some active position depends on where the prompt ends (a prefix hardly does)."""
    expressions = [e for name in session.names for e in session.positions.get(name, ())]
    return any(term.name not in ("f", "all") for e in expressions for term in parse(e))
