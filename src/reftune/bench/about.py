"""What is said at the head of a report: model, budget, rows, precision, versions and accelerators of the runs in it."""

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = ("python", "reftune", "torch", "transformers", "peft")


def about(rows: Sequence[dict[str, Any]]) -> str:
    """One paragraph on all final runs, or the sweeps where no trained one is final: what is true of some is said so."""
    finals = [row for row in rows if row["stage"] == "final"]
    spec, seeds = finals[0]["spec"], sorted({row["seed"] for row in finals})
    counts = {n: c for row in finals for n, c in row["rows"].items()}
    sizes = ", ".join(f"{n} {c['train']}/{c['select']}/{c['test']}" for n, c in counts.items())
    trained = [row for row in finals if row["steps"]] or [row for row in rows if row["stage"] == "sweep"]
    budgets = dict.fromkeys(_budget(row) for row in trained)
    found = {name: {row["versions"].get(name) for row in finals} - {None} for name in finals[0]["versions"]}
    kept = ", ".join(f"{name} {' and '.join(sorted(found[name]))}" for name in found if name in _SHOWN)
    swept = [row for row in trained if row.get("sweep") or row["stage"] == "sweep"]
    rates = "chosen on the selection rows" if swept else "given"
    if swept and len(swept) < len(trained):
        rates += " where several were tried"
    return (
        f"Model {spec['model']}, suite {spec['suite']}, seeds {', '.join(map(str, seeds))}. "
        f"Every method: {' or '.join(budgets) or 'no training'}, the same rows in the same order; learning rate "
        f"{rates}. Rows (train/select/test): {sizes}.{_lengths([*finals, *trained])}{_precision(trained)} "
        f"Versions: {kept}.{_accelerators(finals)}"
    )


def _lengths(rows: Sequence[dict[str, Any]]) -> str:
    """How many training rows `train.max_length` left out or cut, and prompts cut that are scored; "" if none."""

    def most(key: str) -> str:
        counts: dict[str, int] = {}
        for row in rows:
            for name, seen in row["rows"].items():
                counts[name] = max(counts.get(name, 0), seen.get(key, 0))
        return ", ".join(f"{name} {count}" for name, count in counts.items() if count)

    short, out, cut = most("prompts_cut"), most("left_out"), most("cut")
    said = [f"left out for a prompt that is too long: {out}"] if out else []
    said += [f"answers cut: {cut}"] if cut else []
    of_rows = f" Of the training rows, {'; '.join(said)}." if said else ""
    return of_rows + (f" Prompts too long for the model, scored without their beginning: {short}." if short else "")


def _precision(finals: Sequence[dict[str, Any]]) -> str:
    """Which methods were trained in which precision; "" if the rows do not say."""
    users: dict[str, dict[str, list[str]]] = {}
    for row in finals:
        if row["steps"] and "bf16" in row["spec"]["train"]:
            tasks = users.setdefault(_trained_in(row), {}).setdefault(row["method"], [])
            tasks += [] if row["task"] in tasks else [row["task"]]
    if len(users) < 2:
        return f" Trained in {next(iter(users))}." if users else ""
    most = max(users, key=lambda name: sum(map(len, users[name].values())))
    rest = []
    for name in sorted(users.keys() - {most}):
        methods = (f"{method} ({', '.join(tasks)})" for method, tasks in users[name].items())
        rest.append(f"{name} for {', '.join(methods)}")
    return f" Trained in {most}, but {'; '.join(rest)}."


def _trained_in(row: Mapping[str, Any]) -> str:
    if row["spec"]["train"]["bf16"]:
        return "bf16 autocast"
    # a grid without a dtype takes float32 on a CPU and what the checkpoint says elsewhere: `models.default_dtype`
    default = "float32" if row.get("machine", {}).get("device", "cpu") == "cpu" else "the checkpoint's dtype"
    return str(row["spec"].get("dtype") or default)


def _accelerators(finals: Sequence[dict[str, Any]]) -> str:
    names = [row["machine"]["accelerator"] for row in finals if row.get("machine", {}).get("accelerator")]
    if not names:
        return ""
    share = "" if len(names) == len(finals) else f" ({len(names)} of {len(finals)} runs)"
    return f" Accelerator: {', '.join(sorted(set(names)))}{share}."


def _budget(row: Mapping[str, Any]) -> str:
    train = row["spec"]["train"]
    length = f"{train['steps']} steps" if train["steps"] is not None else f"{train['epochs']:g} epochs"
    without = " without dropout" if train.get("disable_dropout") else ""
    return f"{length} of {train['batch_size'] * train['gradient_accumulation_steps']} rows{without}"
