"""The command `persona`: a click group that imports a verb's module only when the verb is typed."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from persona import __version__
from persona.core.host.errors import PersonaError, closest


class LazyGroup(click.Group):
    """Lists the verbs that plugins give (persona's own are given like any other's) and imports one when it is typed."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Persona's own verbs first, then those of other plugins."""
        return list(_host(context).provided("command"))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import the module of one verb."""
        if name not in self.list_commands(context):
            return None
        loaded: click.Command = _host(context).load("command", name)
        return loaded

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        """As click's, with the nearest verbs in the error."""
        try:
            return super().resolve_command(context, args)
        except click.UsageError as error:
            near = closest(args[0], self.list_commands(context)) if args else []
            if near and "Did you mean" not in error.message:
                raise click.UsageError(f"{error.message} Did you mean {' or '.join(near)}?", context) from error
            raise

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of verbs, without importing any of them."""
        rows = [(name, found.summary) for name, found in _host(context).provided("command").items()]
        with formatter.section("Verbs"):
            formatter.write_dl(rows)


def _host(context: click.Context) -> Any:
    from persona.api import host

    parameters = context.find_root().params
    without = [name.removeprefix("no:") for name in parameters.get("plugin_switch") or () if name.startswith("no:")]
    return host(without=tuple(without))


def _check_switch(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    for item in value:
        if not item.startswith("no:"):
            raise click.BadParameter(f"{item!r} is not of the form no:NAME", context, parameter)
    return value


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start here: persona train --plugin dreambooth",
)
@click.version_option(__version__, message="persona %(version)s")
@click.option(
    "-p", "plugin_switch", multiple=True, metavar="no:NAME", callback=_check_switch, help="Leave a plugin out."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(plugin_switch: tuple[str, ...], debug: bool) -> None:
    """Personalise text-to-image diffusion models: any method, any framework, one file that works everywhere."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 (it failed), 2 (bad use) or 130 (interrupted)."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code; errors are printed as one message and the line to type."""
    debug = "--debug" in arguments or bool(os.environ.get("PERSONA_DEBUG"))
    # --debug is taken anywhere on the line, since people add it to the end of what just failed.
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = cli.main(args=arguments, prog_name="persona", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        print("interrupted", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "persona"
        print(f"error: {error.format_message()}\n  See what there is: {path} --help", file=sys.stderr)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PersonaError as error:
        if debug:
            raise
        print(error.message if error.exit_code == 130 else f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader went away (`persona … | head`): not our failure, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            raise
        print(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        print("  See where: add --debug", file=sys.stderr)
        return 1
    except MemoryError:
        if debug:
            raise
        print("error: Out of memory.\n  Lower it: --batch 1, or smaller pictures: --width 256", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            raise
        print(f"error: unexpected {type(error).__name__}: {error}", file=sys.stderr)
        print("  This is a bug in persona or a plugin. See where: add --debug", file=sys.stderr)
        return 1
