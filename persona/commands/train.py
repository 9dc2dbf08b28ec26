"""`persona train`: a method, pictures, a base; or a recipe; or a run to go on with."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from persona.commands.options import click_options
from persona.core.host.errors import UsageError
from persona.core.training.settings import TrainSettings

DEFAULT_RECIPE = "persona.yaml"


class TrainCommand(click.Command):
    """Takes and shows the options of the method named on the line or in the recipe, besides the shared ones."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> click.Context:
        """Look for the method in the arguments before they are parsed."""
        context = click.Context(self, info_name=info_name, parent=parent, **extra)
        self.method_name = method_on_line(args, context)
        return super().make_context(info_name, args, parent, **extra)

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        """The command's own options, the shared settings, then the method's."""
        name = getattr(self, "method_name", None)
        options = _method_options(context, name) if name else None
        own_defaults = getattr(options, "setting_defaults", {}) if options else {}
        shared = click_options(TrainSettings, own_defaults)
        method = click_options(options) if options else []
        names = {parameter.name for parameter in (*self.params, *shared)}
        for parameter in method:
            if parameter.name in names:
                raise UsageError(f"The method {name} has an option {parameter.name} that persona train has already.")
        help_option = self.get_help_option(context)
        return [*self.params, *method, *shared, *([help_option] if help_option else [])]

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Methods first, then options in three groups."""
        provided = _host(context).provided("method")
        with formatter.section("Methods (--plugin NAME; add --help behind it for its options)"):
            formatter.write_dl([(name, found.summary) for name, found in provided.items()])
        name = getattr(self, "method_name", None)
        own = [p.get_help_record(context) for p in self.params if isinstance(p, click.Option)]
        with formatter.section("Options"):
            formatter.write_dl([record for record in own if record])
        if name:
            options = _method_options(context, name)
            with formatter.section(f"Options of {name}"):
                formatter.write_dl([r for r in (p.get_help_record(context) for p in click_options(options)) if r])
            defaults = getattr(options, "setting_defaults", {})
        else:
            defaults = {}
        with formatter.section("Options of every method"):
            records = (p.get_help_record(context) for p in click_options(TrainSettings, defaults))
            formatter.write_dl([record for record in records if record])


def _host(context: click.Context) -> Any:
    from persona.cli import _host as host_of

    return host_of(context)


def _method_options(context: click.Context, name: str) -> Any:
    return _host(context).load("method", name).Options


def method_on_line(arguments: list[str], context: click.Context) -> str | None:
    """The method that the arguments mean: --plugin, or the `method` of the recipe or run they name."""
    for number, argument in enumerate(arguments):
        if argument in ("--plugin", "--method") and number + 1 < len(arguments):
            return arguments[number + 1]
        for flag in ("--plugin=", "--method="):
            if argument.startswith(flag):
                return argument.removeprefix(flag)
    for number, argument in enumerate(arguments):
        file = None
        if argument == "--resume" and number + 1 < len(arguments):
            file = Path(arguments[number + 1]) / "recipe.yaml"
        elif argument.startswith("--resume="):
            file = Path(argument.removeprefix("--resume=")) / "recipe.yaml"
        elif argument.endswith((".yaml", ".yml")):
            file = Path(argument)
        if file and file.is_file():
            return _method_in(file)
    if Path(DEFAULT_RECIPE).is_file():
        return _method_in(Path(DEFAULT_RECIPE))
    return None


def _method_in(file: Path) -> str | None:
    from persona.runs.recipe import read_recipe

    value = read_recipe(file).get("method")
    return str(value[0]) if value else None


@click.command(
    cls=TrainCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.argument("recipe", nargs=-1, metavar="[RECIPE.yaml] [KEY=VALUE]...")
@click.option("--plugin", "--method", "method", metavar="NAME", help="The method.")
@click.option("--data", metavar="DIR", help="A folder of pictures; default: the shipped example subject.")
@click.option(
    "--base",
    metavar="BASE",
    help="Base model: mini, a folder or single file of a model, a hub id, a run.  [default: mini]",
)
@click.option("--backend", metavar="NAME", help="Framework; default: the first that is installed.")
@click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, npu, mps.  [default: auto]")
@click.option("--devices", metavar="N", help="One process a device, the same run on all together.  [default: 1]")
@click.option(
    "--accelerate-config", metavar="FILE", help="Processes, and FSDP, as `accelerate config` wrote it; or none."
)
@click.option("--output", metavar="DIR", help="The run's folder; default: runs/METHOD-NNN.")
@click.option("--resume", "resume_path", metavar="RUN", help="Go on with a run where its last checkpoint is.")
@click.option("--allow-change", is_flag=True, help="With --resume: go on although data, base or options changed.")
@click.option("--dry-run", is_flag=True, help="Try a few steps, say what the run would need; keep nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines.")
@click.pass_context
def train(context: click.Context, /, recipe: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Make a model personal: a subject, a style, a word.

    Without --data and without a persona.yaml in the current folder, the shipped example subject is trained on the
    embedded base model.
    """
    from persona.commands.progress import reporter
    from persona.runs.assemble import assemble
    from persona.runs.estimate import estimate, print_estimate
    from persona.runs.preparing import prepare
    from persona.runs.training import resume, start

    host = _host(context)
    words = list(recipe)
    typed = {key: value for key, value in values.items() if value is not None and value != ()}
    wanted = assemble(
        host,
        words,
        typed,
        default_recipe=Path(DEFAULT_RECIPE),
    )
    with reporter(as_json) as report:
        for note in wanted.notes:
            report.note(note)
        if values["dry_run"]:
            ready = prepare(wanted.recipe, host, report.note)
            result = estimate(ready, host)
            click.echo(json.dumps(result, indent=1)) if as_json else print_estimate(result)
            return
        with stop_on_interrupt(report.note) as stop:
            if wanted.run is not None:
                run = resume(
                    wanted.run,
                    wanted.recipe,
                    host,
                    allow_change=values["allow_change"],
                    emit=report.event,
                    stop=stop,
                )
            else:
                run = start(wanted.recipe, host, emit=report.event, stop=stop)
        report.finished(run)


@contextmanager
def stop_on_interrupt(tell: Any) -> Iterator[Any]:
    """The first interrupt lets the step finish and be saved; the second stops at once."""
    state = {"asked": False}

    def handle(number: int, frame: Any) -> None:
        if state["asked"]:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        state["asked"] = True
        print("\nstopping after this step and saving; once more to stop at once", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: state["asked"]
    finally:
        signal.signal(signal.SIGINT, before)
