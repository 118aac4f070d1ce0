"""Train an adapter: from a recipe, or with `ReftTrainer`, which leaves out what the frozen base makes unnecessary.

from reftune.train import load_recipe, train
result = train(load_recipe("recipes/emoji.yaml"))
result.output_dir, result.size
"""

from reftune.train.head_rate import HeadRate
from reftune.train.recipe import DataSection, ModelSection, Recipe, ReftSection, TrainSection
from reftune.train.recipe_file import RecipeError, load_recipe, save_recipe, to_yaml
from reftune.train.reuse import DiskStore, MemoryStore, Reuse
from reftune.train.run import TrainResult, train
from reftune.train.trainer import ReftTrainer, ReusesFrozenBase

__all__ = [
    "DataSection",
    "DiskStore",
    "HeadRate",
    "MemoryStore",
    "ModelSection",
    "Recipe",
    "RecipeError",
    "ReftSection",
    "ReftTrainer",
    "Reuse",
    "ReusesFrozenBase",
    "TrainResult",
    "TrainSection",
    "load_recipe",
    "save_recipe",
    "to_yaml",
    "train",
]
