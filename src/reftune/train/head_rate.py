"""`HeadRate`: a learning rate of its own for the head that is trained beside the edits (`modules_to_save`).

    class MyTrainer(HeadRate, transformers.Trainer): ...
    MyTrainer(..., head_lr=3e-4)

A new head has to move every number of a matrix that starts at random; at the rates that an edit of a few thousand
numbers wants, that may drown what the edit learns. Mixin for any trainer.
"""

from collections.abc import Collection
from typing import Any


class HeadRate:
    """Mixin in front of a trainer class.

    Args:
        head_lr: peak rate of the head; warm-up and decay are those of the other numbers. None: their rate too.

    Raises:
        ValueError: for a negative rate; at the first step, if no head is trained.
    """

    head_modules: Collection[str] = ("modules_to_save",)  # parts of the names of what is the head

    def __init__(self, *args: Any, head_lr: float | None = None, **kwargs: Any) -> None:
        if head_lr is not None and head_lr < 0:
            raise ValueError(f"head_lr is a learning rate, and must be 0 or above, but is {head_lr}.")
        super().__init__(*args, **kwargs)
        self.head_lr = head_lr

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own optimiser, the head in groups of its own."""
        own: Any = self
        trainer: Any = super()
        given = own.optimizer is not None  # by the caller, whose groups are not ours to change
        optimizer = trainer.create_optimizer(*args, **kwargs)
        if self.head_lr is not None and not given:
            model = args[0] if args else kwargs.get("model") or own.model
            names = set(self.head_modules)
            head = {id(p) for name, p in model.named_parameters() if names & set(name.split("."))}
            _apart(optimizer, head, self.head_lr)
        return optimizer


def _apart(optimizer: Any, head: set[int], lr: float) -> None:
    """Move these parameters to groups with this rate."""
    moved = 0
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in head]
        rest = [p for p in group["params"] if id(p) not in head]
        moved += len(own)
        if own and rest:
            group["params"] = rest
            optimizer.add_param_group({**group, "params": own, "lr": lr})
        elif own:
            group["lr"] = lr
    if not moved:
        raise ValueError("head_lr is the rate of modules_to_save, and none is trained: name some, or set no head_lr.")
