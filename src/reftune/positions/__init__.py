"""Positions: an expression such as "f2+l2" → the tokens to edit, for every row of every batch. Knows torch alone."""

from .grammar import Term as Term
from .grammar import groups as groups
from .grammar import parse as parse
from .layout import Layout as Layout
from .layout import generated as generated
from .layout import layout as layout
from .layout import packed_starts as packed_starts
from .select import NoPromptError as NoPromptError
from .select import check_prompts as check_prompts
from .select import select as select
from .select import select_group as select_group
