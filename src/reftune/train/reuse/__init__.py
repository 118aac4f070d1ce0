"""What a frozen causal base makes unnecessary: logits nobody scores, blocks below the first edit, prompts before it.

See docs/reuse.md; `reftune.train.ReftTrainer` uses it by itself.
"""

from .device_store import DeviceStore, store_near
from .engine import Prepared, Reuse
from .plan import Plan, make_plan
from .store import DiskStore, MemoryStore, Store
from .window import NotReusableError

__all__ = [
    "DeviceStore",
    "DiskStore",
    "MemoryStore",
    "NotReusableError",
    "Plan",
    "Prepared",
    "Reuse",
    "Store",
    "make_plan",
    "store_near",
]
