"""The order of the rows with `train_sampling_strategy: group_by_length`: batches of rows of about one length.

Of GLUE's tokens, padded to the longest of 16, 38 to 70 % are what was written (`benchmarks/padding.py`). The
`LengthGroupedSampler` of transformers draws from the global generator, whose state is another for every method, and
goes from long rows to short ones in each stretch; here the order is the seed's and the epoch's, and the batches come in
any order.
"""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

_STRETCH = 50  # batches that are sorted together, as in transformers


class ByLength(Sampler[int]):
    """Indices of rows of these lengths, each once an epoch, so that every `batch_size` of them are about as long.

    `set_epoch` is called by accelerate's data loaders: a resumed run has the order that it would have had.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self.seed} {self.epoch}")
        order = chance.sample(range(len(self.lengths)), len(self.lengths))
        size, batches = self.batch_size, []
        for start in range(0, len(order), size * _STRETCH):
            stretch = sorted(order[start : start + size * _STRETCH], key=self.lengths.__getitem__)
            batches += [stretch[i : i + size] for i in range(0, len(stretch), size)]
        last = [batches.pop()] if len(batches[-1]) < size else []  # in between, it would shift all that follow
        chance.shuffle(batches)
        return (i for batch in [*batches, *last] for i in batch)
