"""Several adapters on one model: add them up, see where they conflict, share them together.

    style, tone = reftune.adapters(model, "style", "tone")
    with (style + 0.5 * tone).on(model): ...
    print(reftune.conflicts(model, ["style", "tone"]))
    reftune.save_composition(model, style + 0.5 * tone, "runs/mine")

Baking and merging are the tuner's: `model.add_weighted_adapter(...)`, `model.merge_and_unload()`.
"""

from .algebra import Composition as Composition
from .algebra import adapters as adapters
from .algebra import bake as bake
from .algebra import compose as compose
from .algebra import current as current
from .algebra import strength as strength
from .conflict import Conflict as Conflict
from .conflict import ConflictReport as ConflictReport
from .conflict import conflicts as conflicts
from .sharing import load_composed as load_composed
from .sharing import load_composition as load_composition
from .sharing import save_composition as save_composition
