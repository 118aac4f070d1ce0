"""The Typer app: one verb a function, each a few lines over the function that does the work."""

import importlib
import os
import sys
from typing import Annotated, Any

import typer

from reftune.cli.bench import bench_app
from reftune.cli.flags import overrides, recipe_flags

app = typer.Typer(
    name="reftune",
    help="Representation finetuning (ReFT): train, try and inspect adapters of a few kilobytes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")

AdapterOption = Annotated[str | None, typer.Option("--adapter", help="Directory (or hub id) of an adapter.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Base model: hub id, directory, .gguf file, or smollm2-135m."),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0: greedy.")]


@app.callback()
def before(
    import_: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import first: it registers interventions of your own."),
    ] = None,
) -> None:
    """Import what the verbs are to know, from the working directory too, as `python -m` would."""
    if import_ and not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    for name in import_ or []:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            hint = " (a module's name has dots and no .py)" if name.endswith(".py") or "/" in name else ""
            raise ImportError(
                f"--import {name}: {error}{hint}. Python looks in its path and in {os.getcwd()}."
            ) from error


@app.command()
@recipe_flags
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="Options override its keys.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.lr=1e-3.")
    ] = None,
    **flags: Any,
) -> None:
    """Train an adapter as a recipe says."""
    from reftune.train import load_recipe
    from reftune.train import train as run
    from reftune.train.run import last_line

    result = run(load_recipe(recipe, overrides(set_ or [], flags)))
    typer.echo(last_line(result))


@app.command()
def chat(
    adapter: AdapterOption = None,
    model: ModelOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
) -> None:
    """Chat with an adapter (or a base model): /base compares with the base, /reset starts anew, /quit ends."""
    from reftune.cli.talk import chat as run
    from reftune.cli.talk import open_model

    run(open_model(adapter, model), max_new_tokens=max_new_tokens, temperature=temperature)


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts.")],
    adapter: AdapterOption = None,
    model: ModelOption = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Let the adapter's base answer.")] = False,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
) -> None:
    """Answer prompts, one answer a line block."""
    from reftune.cli.talk import open_model, reply

    answers = reply(
        open_model(adapter, model),
        prompts,
        adapter=not no_adapter,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        typer.echo(answer if len(prompts) == 1 else f"> {prompt}\n{answer}")


@app.command()
def explain(
    text: Annotated[str, typer.Argument(help="A prompt.")],
    adapter: Annotated[str, typer.Option("--adapter", help="Directory (or hub id) of an adapter.")],
    answer: Annotated[str, typer.Option("--answer", help="Generated text, to see what gen and all edit.")] = "",
    model: ModelOption = None,
) -> None:
    """Show which tokens of a prompt an adapter edits, and at which layers."""
    from reftune.cli.explain import print_explanation
    from reftune.cli.talk import open_model

    opened = open_model(adapter, model)
    print_explanation(opened.model, opened.tokenizer, text, answer)


@app.command()
def info(
    adapter: Annotated[str, typer.Argument(metavar="DIR", help="Directory of an adapter.")],
    cost: Annotated[bool, typer.Option("--cost", help="Count operations beside the base's.")] = False,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Prompt tokens that --cost counts.")] = 128,
    new: Annotated[int, typer.Option("--new", min=0, help="Generated tokens that --cost counts.")] = 256,
) -> None:
    """Show what an adapter is: its size, what it edits, its base, and how orthonormal it is."""
    from reftune.cli.info import info as run
    from reftune.cli.info import print_cost

    run(adapter)
    if cost:
        print_cost(adapter, prompt, new)


@app.command()
def demo(
    output_dir: Annotated[str, typer.Option("--output-dir", help="Where the adapter goes.")] = "runs/emoji",
    model: ModelOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Another seed than the recipe's.")] = None,
) -> None:
    """Train a small model on ten examples to answer in emoji, and show it before and after."""
    from reftune.cli.demo import demo as run

    run(output_dir, model=model, seed=seed)
