"""Read the YAML of a recipe or a grid: a key that is there twice is an error, and every error is one line.

content = parse(read_text(path), str(path))
"""

import functools
from typing import Any


class RecipeError(ValueError):
    """Something in a recipe, a grid, or a flag over it, is wrong; the message says what and what to do."""


def read_text(path: Any) -> str:
    """The text of a file (a `Path`, or one in a package)."""
    try:
        return str(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: save it as UTF-8.") from error


def parse(text: str, name: str) -> Any:
    """The plain data of YAML text; errors begin with `name`."""
    try:
        loader = _loader()(text)
        loader.name = name
        return loader.get_single_data()
    except yaml_package().YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RecipeError(f"{name} is not YAML{where}: {' '.join(str(problem or error).split())}.") from error


def yaml_package() -> Any:
    """The package, or an ImportError that says what to install."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("Recipes and grids need the package pyyaml: pip install 'reftune[cli]'.") from error
    return yaml


@functools.cache
def _loader() -> Any:
    yaml_package()
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's own keeps the last of two equal keys."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:  # here, what a merge (<<) brings is not among them yet
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    line = key.start_mark.line + 1
                    raise RecipeError(
                        f"{self.name}, line {line}: the key {key.value!r} is there a second time. Write it once."
                    )
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            return node

    return Loader
