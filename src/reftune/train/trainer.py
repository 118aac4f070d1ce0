"""`ReftTrainer`: transformers' Trainer, which leaves out what the frozen base makes unnecessary.

    trainer = ReftTrainer(model=model, args=args, train_dataset=rows, data_collator=ReftDataCollator(tokenizer))
    trainer.train()                        # says once what it reuses, and why not the rest

Losses and gradients are those of a plain Trainer; see docs/reuse.md. `ReusesFrozenBase` is the same for another
trainer: `class MyTrainer(ReusesFrozenBase, SFTTrainer): ...`.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any, Literal

import transformers

from .head_rate import HeadRate
from .reuse.check import LossOf, check, of_the_model
from .reuse.device_store import store_near
from .reuse.engine import Reuse
from .reuse.store import DiskStore, MemoryStore, Store, size_words

Mode = Literal["auto", "off", "memory", "disk"]


class ReusesFrozenBase:
    """Mixin in front of a trainer class.

    Args:
        reuse: "auto" keeps states if examples come more than once, in main memory or, on an accelerator, there
            (`DeviceStore`); "memory" and "disk" keep them always, in main memory or on the disk over restarts; "off"
            is the plain trainer. A store that another trainer has filled may be passed too: its entries serve every
            adapter with the same first edited layer and the same suffix.
        reuse_budget: bytes to keep at most, in each process; None is half of the memory, or of the disk, that is
            free, on an accelerator a quarter.
        reuse_dir: where "disk" keeps them; None is `<output_dir>/reuse`.
        say: takes messages for the user; None prints them, on the main process.
    """

    # whether the loss takes any logits with the labels they predict; None: where it is the model's or transformers' own
    selects_logits: bool | None = None

    def __init__(
        self,
        *args: Any,
        reuse: Mode | Store = "auto",
        reuse_budget: int | None = None,
        reuse_dir: str | os.PathLike[str] | None = None,
        say: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        own: Any = self
        self._say = say or (lambda text: print(text, flush=True))
        self._loss_only = False
        self._checked: set[Any] = set()
        self._keeps_always = reuse not in ("auto", "off")
        self.reuse: Reuse | None = None
        if isinstance(reuse, Store):
            store = reuse
        elif reuse == "disk":
            store = DiskStore(reuse_dir or os.path.join(own.args.output_dir, "reuse"), reuse_budget)
        elif reuse == "auto":
            store = store_near(own.args.device, reuse_budget)
        elif reuse == "memory":
            store = MemoryStore(reuse_budget)
        elif reuse == "off":
            return
        else:
            raise ValueError(f'reuse is "auto", "off", "memory", "disk" or a store, but is {reuse!r}.')
        model = own.accelerator.unwrap_model(own.model)
        # a resumed run finds other rows kept than the one it goes on from, and shall end in the same bits
        alone = own.args.device.type == "cpu" and own.args.save_strategy != "no"
        self.reuse = Reuse(model, store, own.accelerator.autocast, self._tell, self._selects(), alone)
        reason = self._against()
        if reason is not None:
            self.reuse.forget(reason)

    @property
    def reuse_plan(self) -> str:
        """What is reused, and why not the rest, in words."""
        return "Reuse: nothing, it is off." if self.reuse is None else str(self.reuse.plan)

    def _selects(self) -> bool:
        if self.selects_logits is not None:
            return self.selects_logits
        own: Any = self
        return own.compute_loss_func is None and not self._computes_itself()

    def _computes_itself(self) -> bool:
        """Whether the trainer behind this class has a `compute_loss` that is not transformers' own."""
        behind: Any = super()
        return getattr(behind.compute_loss, "__func__", None) is not transformers.Trainer.compute_loss

    def _against(self) -> str | None:
        own: Any = self
        if own.args.torch_compile:
            return "the model is compiled"
        if own.is_fsdp_enabled or own.is_deepspeed_enabled:
            return "the base is sharded"
        if own.args.n_gpu > 1:
            return "one process shares a batch out to several devices; start one process for each (torchrun)"
        if own.args.use_liger_kernel:
            return "liger kernels replace the head"
        return None

    def _tell(self, text: str) -> None:
        own: Any = self
        if own.is_world_process_zero():
            self._say(text)

    # -- what Trainer calls ---------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.reuse is not None:
            self.reuse.begin()
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        own: Any = self
        if self.reuse is not None and not own.is_in_train:  # what was done to the model since may have left no trace
            self.reuse.begin()
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        before, self._loss_only = self._loss_only, prediction_loss_only
        try:
            return super().prediction_step(  # type: ignore[misc]
                model, inputs, prediction_loss_only, *args, **kwargs
            )
        finally:
            self._loss_only = before

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own loss, on the batch without what need not be computed.

        Where whole outputs are asked for (compute_metrics, predict), nothing is left out.
        """
        prepared = None
        if self.reuse is not None and (self._loss_only or not return_outputs):
            prepared = self._prepare(model, inputs, num_items_in_batch)
        if prepared is None:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        with prepared.active():
            return super().compute_loss(  # type: ignore[misc]
                model, prepared.inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )

    def _loss_of_check(self, num_items_in_batch: Any) -> LossOf:
        if self._computes_itself() and self.selects_logits is not None:
            return of_the_model  # it has been looked at; one that logs and counts would log and count the check
        behind: Any = super()

        def compute(model: Any, inputs: dict[str, Any], items: Any) -> Any:
            counted = None if num_items_in_batch is None else items
            return behind.compute_loss(model, inputs, num_items_in_batch=counted)

        return compute

    def _prepare(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        assert self.reuse is not None
        own: Any = self
        inner = own.accelerator.unwrap_model(model)
        if inner is not self.reuse.model:  # model_init has made another one
            self.reuse.model = inner
            self.reuse.begin()
            self._checked.clear()
        keep = self._keeps()
        plan = self.reuse.plan
        case = (plan.adapters, plan.logits, plan.depth, plan.split, model.training, keep)
        if case not in self._checked:
            reason = None
            if not plan.anything or self.reuse.takes(inputs):  # else the next batch is the first to be compared
                self._checked.add(case)
                loss_of = self._loss_of_check(num_items_in_batch)
                reason = check(self.reuse, inner, inputs, keep, loss_of) if plan.anything else None
            if reason is not None:
                self.reuse.forget(reason)
                self._checked |= {str(self.reuse.plan)}
                self._tell(f"Reuse: switched off, because {reason}. Training goes on plainly.")
                return None
            if str(plan) not in self._checked:
                self._checked.add(str(plan))
                self._tell(str(plan) + self._size(keep))
        return self.reuse.prepare(inputs, keep)

    def _size(self, keep: bool) -> str:
        """How much will be kept, told from the rows of the check."""
        own: Any = self
        store = self.reuse.store if self.reuse is not None else None
        if not keep or store is None or not store.used or not store.computed:
            return ""
        text = f"\nKept in {store.where}, at most {size_words(store.budget)}."
        with contextlib.suppress(TypeError):  # a stream has no length
            count = len(own.train_dataset)
            text += f" {count} examples need about {size_words(store.used / store.computed * count)}."
        return text

    def _keeps(self) -> bool:
        """Whether this batch's rows come again."""
        own: Any = self
        if self._keeps_always:
            return True
        if not own.model.training:
            return own.is_in_train
        return own.state.num_train_epochs > 1


class ReftTrainer(HeadRate, ReusesFrozenBase, transformers.Trainer):
    """`transformers.Trainer` for a model with ReFT; see `ReusesFrozenBase` for `reuse`, `reuse_budget`, `reuse_dir`,
    and `HeadRate` for `head_lr`, the rate of `modules_to_save`.

    Without a data_collator, and with a tokenizer as processing_class, it takes `ReftDataCollator`.
    """

    def __init__(self, model: Any = None, args: Any = None, data_collator: Any = None, **kwargs: Any) -> None:
        tokenizer = kwargs.get("processing_class")
        if data_collator is None and hasattr(tokenizer, "pad_token_id"):
            from reftune.data import ReftDataCollator

            data_collator = ReftDataCollator(tokenizer)
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
