"""A grid: which methods, tasks and seeds, on which model, with what budget; from YAML; and the jobs it is made of.

grid = load_grid("recipes/bench/glue-minilm.yaml", {"seeds": [0]})     # a path, or a preset such as paper/commonsense
jobs(grid)                                                             # sweeps, then one job a task, method and seed
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from reftune.train.recipe_file import from_dict
from reftune.train.yaml_file import RecipeError, parse, read_text

from .checks import check_methods, check_training, check_values
from .methods import Method, is_reft, rates, resolve
from .tasks import SUITES, task


@dataclass
class RowsSection:
    """Rows of each task; null takes all (of `select`, a tenth of the training rows).

    `split_seed` halves GLUE's validation rows the same for all seeds, so that no test row is among the rows that the
    learning rates are chosen by; null halves them anew for each seed, as the paper does.
    """

    train: int | None = None
    select: int | None = None
    test: int | None = None
    split_seed: int | None = None


@dataclass
class BudgetSection:
    """The training run, one for all methods."""

    steps: int | None = None  # optimiser steps; overrides epochs
    epochs: float = 3.0
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    head_lr: float | None = None  # GLUE: of the head beside every method but the probe; null: the method's rate
    warmup: float = 0.1  # below 1 a share of the steps
    weight_decay: float = 0.0
    lr_scheduler: str = "linear"
    max_grad_norm: float = 1.0
    max_length: int = 512
    disable_dropout: bool = False  # of the base and of a classifier's head, in training
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"  # rows of about one length a batch
    bf16: bool = False  # autocast, in training and evaluation
    checkpoint_steps: int | None = None  # a run that was cut off goes on from its last checkpoint; null: starts anew
    keep: Literal["last", "best"] = "last"  # GLUE: the epoch with the best score on the selection rows, as the paper


@dataclass
class SweepSection:
    """The choice of the learning rate, on the selection rows."""

    steps: int | None = None  # null: the whole budget
    seed: int = 0
    by: Literal["loss", "score"] = "loss"


@dataclass
class ScoringSection:
    """How text tasks are scored."""

    batch_size: int = 16
    generate: bool = True  # answers by greedy decoding, or as `generation` says
    loglikelihood: bool = True  # choices by their log-likelihood
    max_new_tokens: int = 32
    generation: dict[str, Any] = field(default_factory=dict)  # arguments of `generate`
    judge: dict[str, Any] | None = None  # {url:, model:, key_env:} or {reward_model:}


@dataclass
class Grid:
    """Everything `reftune bench run` needs."""

    suite: str = "glue"
    tasks: list[str] | None = None  # evaluated; null: the whole suite
    train_tasks: list[str] | None = None  # trained on jointly; null: those of `tasks` with training rows
    joint: bool | None = None  # one training for all tasks; null: yes, except on GLUE
    model: str = "smollm2-135m"
    dtype: str | None = None
    attention: str | None = None  # attn_implementation of `from_pretrained`; null: its own choice
    template: Literal["paper", "chat", "cloze"] = "paper"
    methods: list[Any] = field(default_factory=lambda: ["loreft", "lora"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    rows: RowsSection = field(default_factory=RowsSection)
    train: BudgetSection = field(default_factory=BudgetSection)
    sweep: SweepSection = field(default_factory=SweepSection)
    scoring: ScoringSection = field(default_factory=ScoringSection)
    reft: dict[str, Any] = field(default_factory=dict)  # settings of all low-rank ReFT kinds
    # task: {train: {...} for all methods; lrs: and settings of the ReFT kinds}; for suites that train once a task
    per_task: dict[str, Any] = field(default_factory=dict)

    @property
    def classifies(self) -> bool:
        """Whether classifiers with a new head run it (GLUE but as a cloze), not a language model by its words."""
        return self.suite == "glue" and self.template != "cloze"


@dataclass(frozen=True)
class Job:
    """One run. `lr` is None in a final run with several rates: it is the best of the sweep's."""

    stage: Literal["sweep", "final"]
    suite: str
    tasks: tuple[str, ...]
    train_tasks: tuple[str, ...]
    method: Method
    seed: int
    lr: float | None
    model: str
    settings: dict[str, Any]  # dtype, attention, template, rows, train, sweep, scoring: the resolved sections

    @property
    def task(self) -> str:
        """The task's name, or "a+b+c" of a joint run."""
        return "+".join(self.tasks)

    @property
    def classifies(self) -> bool:
        """As `Grid.classifies`."""
        return self.suite == "glue" and self.settings["template"] != "cloze"

    def spec(self) -> dict[str, Any]:
        """Everything that decides the result, as plain data; of a sweep's run not the other rates of its sweep, so that
        a wider one keeps what is done."""
        method = self.method.to_dict()
        if self.stage == "sweep":
            del method["lrs"]
        return {
            "stage": self.stage,
            "suite": self.suite,
            "tasks": list(self.tasks),
            "train_tasks": list(self.train_tasks),
            "method": method,
            "seed": self.seed,
            "lr": self.lr,
            "model": self.model,
            **self.settings,
        }

    @property
    def id(self) -> str:
        """A readable name with a digest of the whole spec."""
        return run_id(self.spec())


def run_id(spec: Mapping[str, Any]) -> str:
    """The name of the run with this `Job.spec`, and of its files."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:10]
    where = spec["tasks"][0] if len(spec["tasks"]) == 1 else spec["suite"]
    rate = f"-lr{spec['lr']:g}" if spec["stage"] == "sweep" else ""
    return f"{where}-{spec['method']['name']}-s{spec['seed']}-{spec['stage']}{rate}-{digest}".replace("/", "_")


def load_grid(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Grid:
    """A grid from a YAML file, a preset's name, or plain data, with overrides such as {"rows.train": 100}."""
    content = dict(source) if isinstance(source, Mapping) else _read(str(source))
    for name, value in (overrides or {}).items():
        part, keys = content, name.split(".")
        for key in keys[:-1]:
            if not isinstance(part.get(key) or {}, Mapping):
                raise RecipeError(f"{name} cannot be set: {key} has no keys, it is {part[key]!r}.")
            part[key] = dict(part.get(key) or {})
            part = part[key]
        part[keys[-1]] = value
    _known(Grid, content, "")
    grid = from_dict(Grid, content)
    if grid.suite not in SUITES:
        raise RecipeError(f"There is no suite {grid.suite!r}. Known: {', '.join(SUITES)}.")
    for name in [*(grid.tasks or ()), *(grid.train_tasks or ()), *grid.per_task]:
        if task(name).suite != grid.suite:
            raise RecipeError(f"The task {name} is of the suite {task(name).suite}, and this grid is {grid.suite}'s.")
    if not grid.seeds or not grid.methods or grid.tasks == []:
        raise RecipeError("A grid needs at least one seed, one method and one task.")
    for name, values in (("seeds", grid.seeds), ("tasks", grid.tasks or []), ("train_tasks", grid.train_tasks or [])):
        if len(set(values)) < len(values):
            raise RecipeError(f"{name} names something twice: {values}.")
    check_values(grid)
    if grid.classifies and any(resolve(m, "glue", grid.reft).method == "base" for m in grid.methods):
        raise RecipeError("The untouched base has no head for GLUE, so it has no score there: use probe instead.")
    plan = jobs(grid)
    check_training(plan)
    check_methods({json.dumps(j.method.to_dict(), sort_keys=True, default=str): j for j in plan}.values())
    return grid


def presets() -> list[str]:
    """The names of the presets that come with the package."""
    root = resources.files("reftune.bench") / "presets"
    found = [(folder, file) for folder in root.iterdir() if folder.is_dir() for file in folder.iterdir()]
    return sorted(f"{folder.name}/{Path(file.name).stem}" for folder, file in found if file.name.endswith(".yaml"))


def jobs(grid: Grid) -> list[Job]:
    """All runs of a grid: the sweeps first, then the final runs seed by seed, so that an early stop is balanced."""
    names = tuple(grid.tasks or SUITES[grid.suite])
    joint = grid.suite != "glue" if grid.joint is None else grid.joint
    trained = tuple(grid.train_tasks or (n for n in names if task(n).trains))
    groups = [(names, trained)] if joint else [((n,), (n,) if grid.train_tasks is None else trained) for n in names]
    sweeps: list[Job] = []
    finals: list[Job] = []
    for evaluated, train_tasks in groups:
        for method, settings in _methods(grid, evaluated):
            one = method.lrs[0] if len(method.lrs) == 1 else None

            def job(
                stage: Any,
                seed: int,
                lr: float | None,
                where: Any = (evaluated, train_tasks),
                what: Any = (method, settings),
            ) -> Job:
                return Job(stage, grid.suite, where[0], where[1], what[0], seed, lr, grid.model, what[1])

            if len(method.lrs) > 1:
                sweeps += [job("sweep", grid.sweep.seed, lr) for lr in method.lrs]
            fixed = method.method == "base" and not grid.scoring.generation.get("do_sample")  # alike for all seeds
            finals += [job("final", seed, one) for seed in grid.seeds[: 1 if fixed else None]]
    names_seen = [(j.task, j.method.name, j.seed) for j in finals]
    if len(set(names_seen)) < len(names_seen):
        raise RecipeError("Two methods of the grid have the same name: give each variant a `name` of its own.")
    return sweeps + sorted(finals, key=lambda j: grid.seeds.index(j.seed))


def resolved_methods(grid: Grid) -> list[Method]:
    """The methods of a grid with their settings, as they run on its first group of tasks."""
    first = jobs(grid)[0].tasks
    return [method for method, _ in _methods(grid, first)]


def _methods(grid: Grid, evaluated: tuple[str, ...]) -> list[tuple[Method, dict[str, Any]]]:
    """The methods as they run on these tasks, each with its settings; `per_task` speaks to single tasks only."""
    own = dict(grid.per_task.get(evaluated[0]) or {}) if len(evaluated) == 1 else {}
    lrs, budget = own.pop("lrs", None), own.pop("train", {})
    if not isinstance(budget, Mapping):
        raise RecipeError(f"per_task.{evaluated[0]}.train must be keys with values, but is {budget!r}.")
    _known(BudgetSection, budget, "per_task.train")
    found = []
    for entry in grid.methods:
        suite = "commonsense" if grid.template == "cloze" else grid.suite  # whose settings are for language models
        method = resolve(entry, suite, grid.reft | own)
        if lrs is not None and is_reft(method.method) and not (isinstance(entry, Mapping) and "lrs" in entry):
            method = dataclasses.replace(method, lrs=rates(lrs, f"per_task.{evaluated[0]}"))
        _known(BudgetSection, method.train, f"train of {method.name}")
        train = dataclasses.asdict(grid.train) | dict(budget) | method.train
        if method.method == "probe":  # all that it trains is the head, at the rate chosen for it
            train["head_lr"] = None
        train = dataclasses.asdict(from_dict(BudgetSection, train, "train"))
        if not train["disable_dropout"]:  # so that runs keep the names that they had before there was such a key
            del train["disable_dropout"]
        settings = {
            "dtype": grid.dtype,
            "attention": grid.attention,
            "template": grid.template,
            "rows": dataclasses.asdict(grid.rows),
            "train": train,
            "sweep": dataclasses.asdict(grid.sweep),
            "scoring": dataclasses.asdict(grid.scoring),
        }
        found.append((method, settings))
    return found


def _known(cls: Any, content: Any, where: str) -> None:
    """Refuse unknown keys with the nearest known one of this section."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in (content if isinstance(content, Mapping) else {}).items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(fields)}."
            raise RecipeError(f"Unknown key {f'{where}.{key}' if where else key!r} in the grid. {hint}")
        if dataclasses.is_dataclass(fields[key].type):
            _known(fields[key].type, value, key)


def _read(source: str) -> dict[str, Any]:
    packaged = resources.files("reftune.bench") / "presets" / f"{source}.yaml"
    path = Path(source)
    if not path.is_file() and source in presets():
        text = read_text(packaged)
    elif path.is_file():
        text = read_text(path)
    else:
        raise RecipeError(f"There is no grid {source}: give a YAML file, or a preset ({', '.join(presets())}).")
    content = parse(text, source)
    if not isinstance(content, dict):
        raise RecipeError(f"{source} must be keys with values (suite:, tasks:, methods: ...), but is {content!r:.80}.")
    return content
