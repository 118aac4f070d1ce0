"""The house: imports point down only, the pure rooms know torch alone, files are small and say what they are."""

import ast
from pathlib import Path

import pytest

import reftune

SOURCE = Path(reftune.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
LINES = 400

# From the ground up; a room may import from those below it and from itself. Rooms on one line do not know each other.
# "reftune" is the package itself, the public names: applications use them like anybody else.
HOUSE = [
    {"interventions", "positions"},
    {"sites"},
    {"tuner"},
    {"gguf_cache"},
    {"models"},
    {"checkpoint"},
    {"api", "operations"},
    {"data", "explaining", "composition"},
    {"reftune"},
    {"train"},
    {"bench", "search", "interpret", "serve"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(HOUSE) for room in rooms}
PURE = {"interventions", "positions", "sites"}
HEAVY = {"transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "huggingface_hub"}


def room(path: Path) -> str:
    """The room a file lies in: the first folder under the package, or the module's own name."""
    return "reftune" if path == SOURCE / "__init__.py" else path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Everything a file imports, anywhere in it, as absolute dotted names."""
    package = ["reftune", *path.relative_to(SOURCE).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def rooms_used(path: Path) -> set[str]:
    """The rooms that a file imports from; `from reftune import x` is the package itself unless x is a room."""
    parts = [name.split(".") for name in imported(path) - {"reftune.__version__"}]  # the version is anybody's
    return {p[1] if len(p) > 1 and p[1] in FLOOR else "reftune" for p in parts if p[0] == "reftune"}


def short(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", FILES, ids=short)
def test_a_file_says_what_it_is_and_is_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert (ast.get_docstring(ast.parse(text)) or "").strip(), f"{short(path)} has no docstring"
    count = len(text.splitlines())
    assert count <= LINES, f"{short(path)} has {count} lines, more than {LINES}: split it by ideas"


@pytest.mark.parametrize("path", FILES, ids=short)
def test_imports_point_down_only(path: Path) -> None:
    here = room(path)
    assert here in FLOOR, f"{short(path)} lies in no known room: give '{here}' a floor in HOUSE"
    for other in rooms_used(path) - {here}:
        assert FLOOR[other] < FLOOR[here], f"{short(path)} imports '{other}', which does not lie below '{here}'"


@pytest.mark.parametrize("path", [f for f in FILES if room(f) in PURE], ids=short)
def test_the_pure_rooms_know_torch_alone(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imported(path)} & HEAVY
    assert not heavy, f"{short(path)} imports {', '.join(heavy)}"
    if room(path) != "sites":
        assert rooms_used(path) <= {room(path)}


def test_the_package_is_a_table_of_contents() -> None:
    body = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8")).body
    assert not [n for n in ast.walk(ast.Module(body, [])) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Lambda)]


def test_this_test_sees_all_ways_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, on files that break the rules."""
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    (tmp_path / "positions").mkdir()
    file = tmp_path / "positions" / "bad.py"
    file.write_text(
        "import reftune.train.run\nfrom ..tuner import config\nfrom .. import sites\nfrom reftune.cli import app\n"
        "from . import grammar\nfrom .grammar import parse\n"
        "def f():\n    import transformers.models\n    from peft import x\n    from reftune import Session\n"
    )
    assert rooms_used(file) == {"train", "tuner", "sites", "cli", "positions", "reftune"}
    assert {"transformers.models", "peft.x"} <= imported(file)
    assert room(file) == "positions"
    assert room(tmp_path / "sites.py") == "sites"
