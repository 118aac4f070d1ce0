"""Write a smaller adapter: the first rows of a saved one, in a directory of its own.

    reftune.truncate("runs/style", "runs/style-2", rank=2)

Reads and writes files alone; the base model is not needed. See `reftune.tuner.truncation` for what can be cut.
"""

import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..tuner import ReftConfig
from ..tuner.atomic import WEIGHTS, commit_config, save_atomically
from ..tuner.truncation import truncate_state
from .card import model_card
from .info import describe
from .save import MARK


def truncate(source: str | os.PathLike[str], destination: str | os.PathLike[str], rank: int) -> None:
    """Write the adapter in `destination` that consists of the first `rank` rows of the one in `source`.

    Raises FileNotFoundError if `source` holds no adapter, ValueError if its rows cannot be cut or if both are one
    directory; warns if the rows were not trained to stand alone. What lies in `source` is not touched.
    """
    if Path(source).resolve() == Path(destination).resolve():
        raise ValueError(f"{source} would be overwritten by its own first rows: give another destination.")
    describe(Path(source))  # says what is wrong with the files
    config = ReftConfig.from_pretrained(str(source), rank=rank)
    tensors = truncate_state(load_file(Path(source) / WEIGHTS), rank)

    def write(directory: str) -> None:
        config.save_pretrained(directory)
        save_file(tensors, Path(directory) / WEIGHTS, metadata={"format": "pt"})
        commit_config(Path(directory))
        if (recipe := Path(source) / "recipe.yaml").is_file():  # has the template that the adapter is asked with
            shutil.copy(recipe, directory)
        info = describe(directory)
        card = model_card(config, list(info.site_names), info.parameters, info.nbytes)
        (Path(directory) / "README.md").write_text(f"{card.rstrip()}\n\n{MARK}\n", encoding="utf-8")

    save_atomically(destination, write)
