"""What is kept: atomic saving with a model card, what a saved adapter is, and reading pyreft's saves."""

from .info import AdapterInfo as AdapterInfo
from .info import describe as describe
from .pyreft import load_pyreft as load_pyreft
from .save import install as install
from .truncate import truncate as truncate
