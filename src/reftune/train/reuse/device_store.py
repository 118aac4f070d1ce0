"""Entries kept on the accelerator itself, where fetching keys and values takes longer than computing them anew.

    store = store_near(torch.device("cuda"))     # a DeviceStore there, a MemoryStore on a CPU

Keys and values of a prompt are many bytes and cheap to compute for a GPU: training on `l2` took longer with them
fetched from main memory than without any reuse (docs/log.md). States between two blocks are small, and worth fetching.
"""

from typing import Any

import torch

from .store import Entry, MemoryStore, size_of, size_words

_SPARE = 0.1  # of the device's memory, left free beyond what a step has needed so far


class DeviceStore(MemoryStore):
    """Entries on a device while it has room; then states go to main memory, and heads are computed each time.

    budget: bytes at most, here and there together; None is a quarter of what is free on the device now, and half of
    main memory. However large, what the largest step so far has needed stays free, and a tenth of the memory beside it.
    """

    def __init__(self, device: torch.device, budget: int | None = None) -> None:
        self.device, self._module = device, getattr(torch, device.type)
        self.where = f"the memory of {device.type}"
        super().__init__(budget)
        self.beyond = MemoryStore(budget)
        self._bounded = budget is not None

    def default_budget(self) -> int:
        return int(self._module.mem_get_info(self.device)[0]) // 4

    def get(self, key: str) -> Entry | None:
        found = self.entries.get(key)
        return self.beyond.get(key) if found is None else found

    def put(self, key: str, entry: Entry) -> bool:
        size = size_of(entry)
        if not self.full and not (self.used + size <= self.budget and self._room(size)):
            self.full = True
            self.say(
                f"Reuse: there is no more room in {self.where} ({size_words(self.used)} are kept); of further examples "
                "the prompts are computed each time, and states between blocks kept in main memory within reuse_budget."
            )
        if not self.full:
            self.entries[key] = entry
            self.used += size
            return True
        over = self._bounded and self.used + self.beyond.used + size > self.budget
        return "state" in entry and not over and self.beyond.put(key, entry)

    def clear(self) -> None:
        super().clear()
        self.beyond.clear()

    def _room(self, size: int) -> bool:
        """Whether the largest step so far would fit beside this."""
        free, total = self._module.mem_get_info(self.device)
        now = self._module.memory_allocated(self.device)
        idle = self._module.memory_reserved(self.device) - now
        again = self._module.max_memory_allocated(self.device) - now
        return bool(free + idle - again - size > _SPARE * total)


def store_near(device: torch.device, budget: int | None = None) -> MemoryStore:
    """Where to keep what a model on this device computes. budget: bytes, None is a share of what is free there."""
    module: Any = getattr(torch, device.type, None)
    return DeviceStore(device, budget) if hasattr(module, "mem_get_info") else MemoryStore(budget)
