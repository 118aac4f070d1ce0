"""What a user sees of a training run: a progress bar with the loss, and a table of what is edited in one example."""

from typing import Any

import transformers


def first_step_table(model: Any, tokenizer: Any, row: dict[str, list[int]]) -> Any:
    """The tokens of one training row with the edited ones marked, as rich's renderable.

    Args:
        model: the PeftModel, which resolves the positions itself.
        row: {"input_ids", "labels"} of one example.
    """
    import torch
    from rich.text import Text

    prompt = next(i for i, label in enumerate(row["labels"]) if label != -100)
    edited = _edited(model, tokenizer, row)
    text = Text("What is edited in the first example: ")
    for index, token in enumerate(row["input_ids"]):
        if index == prompt:
            text.append(" → ", style="dim")
        shown = tokenizer.decode([token]).replace("\n", "⏎")
        text.append(f"[{shown}]" if index in edited else shown, style="bold green" if index in edited else "")
    del torch
    return text


def _edited(model: Any, tokenizer: Any, row: dict[str, list[int]]) -> set[int]:
    raise NotImplementedError


class ProgressCallback(transformers.TrainerCallback):
    """A rich progress bar on a terminal, and about ten plain lines elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._loss = ""
        self._lines = 10

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar; on the main process only."""
        if not state.is_world_process_zero:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        console = Console()
        columns = ("step", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", Remaining(), TextColumn("{task.fields[loss]}"))
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, loss="")
        self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the loss to show."""
        for name in ("loss", "eval_loss"):
            if logs and name in logs:
                self._loss = f"{name.replace('_', ' ')} {float(logs[name]):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar, or print a line now and then."""
        if self._bar is None:
            return
        self._bar.update(self._task, completed=state.global_step, loss=self._loss)
        every = max(1, state.max_steps // self._lines)
        if self._bar.disable and (state.global_step % every == 0 or state.global_step == state.max_steps):
            print(f"step {state.global_step}/{state.max_steps}  {self._loss}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
