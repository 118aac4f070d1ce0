"""The command line: `reftune train | chat | generate | explain | info | demo`, verbs over plain functions.

`main` is the entry point. Its packages (typer, rich, pyyaml, datasets) are the extra `cli`.
"""

import os
import sys
import warnings

_PACKAGES = ("typer", "rich", "yaml", "datasets")


def main() -> None:
    """Run the command line; bad input ends in one line on stderr and exit code 1 (REFTUNE_DEBUG=1 shows where)."""
    import importlib.util

    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"reftune: the command line needs {', '.join(missing)}: pip install 'reftune[cli]'")
    from reftune.cli.app import app

    # Of other packages, about each other: whoever runs a command can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|datasets)\.")
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("REFTUNE_DEBUG"):
            raise
        sys.exit(f"reftune: {error}")
    except Exception as error:  # not foreseen: its kind helps whoever reports it
        if os.environ.get("REFTUNE_DEBUG"):
            raise
        sys.exit(f"reftune: {type(error).__name__}: {error} (REFTUNE_DEBUG=1 shows where)")
