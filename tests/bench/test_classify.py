"""What a training on GLUE keeps; whole runs are in test_runner."""

from pathlib import Path

import torch
from transformers import TrainerState

from reftune.bench.classify import BestEpoch


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    """Scores of the epochs are made up; the numbers kept are those after the best one, also over a cut."""
    model = torch.nn.Linear(2, 2)
    scores = iter([0.1, 0.7, 0.7, 0.6, 0.3])
    best = BestEpoch(lambda made: next(scores), tmp_path)
    for epoch in (0, 1, 2, 2, 3):  # the third once more, as a run does that goes on from a checkpoint before its end
        if epoch == 2:
            best = BestEpoch(lambda made: next(scores), tmp_path)  # another process
        torch.nn.init.constant_(model.weight, epoch)
        best.on_epoch_end(None, TrainerState(epoch=epoch + 1.0), None, model=model)
        assert model.training
    best.on_train_begin(None, TrainerState(global_step=2), None)  # goes on: the copy stays
    assert best.restore(model) == [0.1, 0.7, 0.6, 0.3]
    assert model.weight.unique().tolist() == [1.0]
    model.weight.data.fill_(7)
    assert best.restore(model) == [0.1, 0.7, 0.6, 0.3]  # it stays until the run is done
    assert model.weight.unique().tolist() == [1.0]
    (tmp_path / "best.pt").write_bytes(b"of a killed run")
    best.on_train_begin(None, TrainerState(global_step=0), None)
    assert not list(tmp_path.glob("*"))
