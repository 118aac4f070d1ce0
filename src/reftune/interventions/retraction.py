"""Before a training forward: every R of a model that learns, put right in a few batched factorisations."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .orthogonal import can_retract, retract_
from .rows import LowRankIntervention
from .subspaces import SubspaceIntervention, put_right_together


def retract_all(interventions: Iterable[nn.Module]) -> None:
    """Put every R that learns on orthonormal rows, in one batched factorisation for all equally shaped ones.

    The forward that follows takes them as they are. Modules without such an R are passed over; one whose R is a
    DTensor is marked as sharded and sees to its rows itself. Stacks are looked into; divided interventions are put
    right as a whole.
    """
    single: list[LowRankIntervention] = []
    divided: list[SubspaceIntervention] = []
    for module in interventions:
        if isinstance(module, SubspaceIntervention):
            if _ready(module.parts.values()) and module.orthonormal:
                divided.append(module)
            else:
                single += [part for part in module.parts.values() if not part.orthonormal]
        else:
            single += [part for part in module.modules() if isinstance(part, LowRankIntervention)]
    ready = [m for m in single if m.R.requires_grad and _ready([m]) and (m.orthonormal or m.beside() is not None)]
    orthonormal = [module for module in ready if module.orthonormal]
    retract_([module.R for module in orthonormal], [module.beside() for module in orthonormal])
    for module in ready:
        if module.orthonormal:
            module.put_source_right_()
        else:
            module.put_right_()
        module._fresh = 0 if torch.compiler.is_compiling() else module.R._version
    put_right_together(divided)


def _ready(parts: Iterable[LowRankIntervention]) -> bool:
    """Marks the sharded ones; whether all may be written in place and one learns."""
    parts = list(parts)
    for part in parts:
        part.sharded = part.sharded or isinstance(part.R, DTensor)
    learns = any(part.R.requires_grad for part in parts)
    return learns and all(can_retract(part.R) and not part.sharded for part in parts)
