"""Train an adapter from a recipe with plain `transformers.Trainer`.

from reftune.train import load_recipe, train
result = train(load_recipe("recipes/emoji.yaml"))
result.output_dir, result.size
"""

from reftune.train.recipe import DataSection, ModelSection, Recipe, ReftSection, TrainSection
from reftune.train.recipe_file import RecipeError, load_recipe, save_recipe, to_yaml
from reftune.train.run import TrainResult, train

__all__ = [
    "DataSection",
    "ModelSection",
    "Recipe",
    "RecipeError",
    "ReftSection",
    "TrainResult",
    "TrainSection",
    "load_recipe",
    "save_recipe",
    "to_yaml",
    "train",
]
