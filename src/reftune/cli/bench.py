"""`reftune bench run | report | list`: comparisons of methods over a grid, see `reftune.bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer

bench_app = typer.Typer(
    help="Compare ReFT with LoRA, DoRA, RED, full fine-tuning and others on the paper's tasks.",
    no_args_is_help=True,
)


@bench_app.command()
def run(
    grid: Annotated[str, typer.Argument(metavar="GRID", help="A YAML file, or a preset such as paper/commonsense.")],
    out: Annotated[str, typer.Option("--out", help="Directory of the results; the same one resumes or shares a grid.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Folder of data; else $REFTUNE_DATA, else the hub.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Another model than the grid's.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. rows.train=200.")
    ] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Begin no run after so many.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Stay while other processes finish theirs.")] = True,
    reuse: Annotated[
        str, typer.Option("--reuse", help="auto: compute once what the frozen base makes the same in all runs; off.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and which are done; do none.")] = False,
) -> None:
    """Run a grid: what is done is kept, what is missing is done, several processes share it."""
    from reftune.bench import jobs, load_grid, run_grid
    from reftune.bench.store import done

    wanted = overrides(set_ or [])
    found = load_grid(grid, wanted | ({"model": model} if model else {}))
    plan = jobs(found)
    sweeps, there = sum(job.stage == "sweep" for job in plan), done(out)
    ready = sum(job.id in there for job in plan)
    typer.echo(
        f"{len(plan)} runs on {found.model}: {sweeps} to choose learning rates, {len(plan) - sweeps} final"
        f"{f'; {ready} are done' if there else ''}."
    )
    if dry_run:
        for job in plan:
            typer.echo(f"  {job.id}{' (done)' if job.id in there else ''}")
        return
    outcome = run_grid(found, out, data=data, minutes=minutes, wait=wait, say=typer.echo, reuse=reuse)  # type: ignore[arg-type]
    typer.echo(f"{outcome.finished} runs done here, {outcome.left} left. Results: {Path(out) / 'results.jsonl'}")
    if outcome.failed:
        typer.echo(f"{len(outcome.failed)} failed; their tracebacks are in {Path(out) / 'failures'}.", err=True)
        raise typer.Exit(1)


@bench_app.command()
def report(
    results: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="What `run --out` or `--output` wrote, or a results.jsonl.")
    ],
    output: Annotated[
        str | None, typer.Option("--output", help="Directory for report.md, the rows and plots; else print.")
    ] = None,
    title: Annotated[str, typer.Option("--title", help="Heading of the report.")] = "Results",
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Scores against parameters and time.")] = True,
) -> None:
    """Write the table (mean ± sd over seeds, parameters), the breakdown by task and the plots."""
    from reftune.bench import read_rows
    from reftune.bench import report as write
    from reftune.bench.store import publish

    rows = list({row["id"]: row for source in results for row in read_rows(source)}.values())
    text = write(rows, title)
    if output is None:
        typer.echo(text)
        return
    place = Path(output)
    place.mkdir(parents=True, exist_ok=True)
    made = [publish(rows, place)]
    if plots:
        from reftune.bench.plots import plot_all

        drawn = plot_all(rows, place)
        text += "".join(f"\n![{path.stem}]({path.name})\n" for path in drawn)
        made += drawn
    (place / "report.md").write_text(text, encoding="utf-8")
    typer.echo(f"Wrote {', '.join(str(path) for path in [place / 'report.md', *made])}.")


@bench_app.command("list")
def list_() -> None:
    """Show the suites with their tasks, the methods and the presets."""
    from reftune.bench import METHODS, SUITES, presets

    for suite, tasks in SUITES.items():
        typer.echo(f"{suite}: {', '.join(tasks)}")
    typer.echo(f"methods: {', '.join(METHODS)}")
    typer.echo(f"presets: {', '.join(presets())}")


def overrides(pairs: list[str]) -> dict[str, Any]:
    """`--set key=value` pairs, values read as YAML (so that 1, [a, b] and null mean what they say)."""
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, such as --set rows.train=200, but got {pair!r}.")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {key}: {value!r} is not YAML: {error}") from error
    return found
