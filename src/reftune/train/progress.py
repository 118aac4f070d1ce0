"""What a user sees of a training run: a progress bar with the loss, and a table of what is edited in one example."""

from typing import Any

import transformers

from ..explaining import readable
from ..sites import number_ranges


def first_step_table(model: Any, tokenizer: Any, row: dict[str, list[int]]) -> Any:
    """The tokens of one training row with the edited ones marked, and where they are edited; a rich renderable.

    Args:
        model: the PeftModel, which resolves the positions itself.
        row: {"input_ids", "labels"} of one example.
    """
    from rich.console import Group
    from rich.text import Text

    groups = _edits(model, row)
    edited = {column for columns, _ in groups.values() for column in columns}
    prompt = next(i for i, label in enumerate(row["labels"]) if label != -100)
    text = Text("Edited in the first example, [marked]; the answer begins at \u25b8:\n  ")
    for part, start in ((row["input_ids"][:prompt], 0), (row["input_ids"][prompt:], prompt)):
        text.append(" \u25b8 " if start else "")
        for shown, first, last in readable(tokenizer, part):
            marked = any(start + column in edited for column in range(first, last))
            text.append(f"[{shown}]" if marked else shown, style="bold green" if marked else "dim")
    lines = [
        Text(f"  {group}: {len(columns)} of {len(row['input_ids'])} tokens, layer{'s' * (len(layers) > 1)} ").append(
            number_ranges(layers), style="bold"
        )
        for group, (columns, layers) in groups.items()
    ]
    return Group(text, *lines)


def _edits(model: Any, row: dict[str, list[int]]) -> dict[str, tuple[tuple[int, ...], list[int]]]:
    """Group of terms -> (columns that it edits, layers)."""
    import torch

    from ..tuner.explain import explain_tokens

    (edits,) = explain_tokens(model, torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
    found: dict[str, tuple[tuple[int, ...], list[int]]] = {}
    for edit in edits:
        _columns, layers = found.setdefault(edit.group, (edit.columns, []))
        if edit.layer is not None and edit.layer not in layers:
            layers.append(edit.layer)
    return {group: (columns, sorted(layers)) for group, (columns, layers) in found.items()}


class ProgressCallback(transformers.TrainerCallback):
    """A rich progress bar on a terminal, and about ten plain lines elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._next = 0  # the step of the next line, where there is no bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar; on the main process only."""
        if not state.is_world_process_zero:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        console = Console()
        loss = TextColumn("{task.fields[loss]}")
        columns = ("step", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", Remaining(), loss)
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, loss="")
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss: beside the bar, or as a line now and then."""
        shown = logs or {}
        words = [f"{key.replace('_', ' ')} {float(shown[key]):.3f}" for key in ("loss", "eval_loss") if key in shown]
        if self._bar is None or not words:
            return
        self._bar.update(self._task, loss=words[0])
        step, last = state.global_step, state.max_steps
        if self._bar.disable and (step >= self._next or step == last or words[0].startswith("eval")):
            print(f"step {step}/{last}  {words[0]}", flush=True)
            self._next = step + max(1, last // 10)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
