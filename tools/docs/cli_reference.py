"""Write docs/cli.md: every verb and flag as `--help` prints them.

python -m tools.docs.cli_reference            write it
python -m tools.docs.cli_reference --check    say whether it is as it would be written, exit 1 if not"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from persona.cli import cli

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
WIDTH = 100
HEAD = """# The command line

What `--help` prints, written by `make docs`; a test compares. Every verb exits 0 (done),
1 (it failed), 2 (bad use) or 130 (interrupted). An error names the thing, says why, and ends with the line to type;
`--debug` shows the traceback.
"""


def lines() -> Iterator[tuple[str, ...]]:
    """The words of every `--help` that is shown: the group, its verbs, their verbs, and train with each method."""
    from persona.api import host

    yield ()
    with click.Context(cli) as context:
        for verb in cli.list_commands(context):
            yield (verb,)
            command = cli.get_command(context, verb)
            if isinstance(command, click.Group):
                yield from ((verb, inner) for inner in command.list_commands(context))
    yield from (("train", "--plugin", method) for method in host().provided("method"))


def help_of(words: tuple[str, ...]) -> str:
    """The text of `persona WORDS --help`, as in a terminal of WIDTH columns. Raises RuntimeError when it fails."""
    answer = CliRunner().invoke(
        cli, [*words, "--help"], prog_name="persona", terminal_width=WIDTH, max_content_width=WIDTH
    )
    if answer.exit_code:
        raise RuntimeError(f"persona {' '.join(words)} --help exits {answer.exit_code}: {answer.output}")
    return "\n".join(line.rstrip() for line in answer.output.rstrip().splitlines())


def page() -> str:
    """The whole page, without what is installed on this machine beside persona."""
    os.environ["PERSONA_PLUGINS"] = ""
    sections = [HEAD]
    for words in lines():
        command = " ".join(["persona", *words])
        sections.append(f"## {command}\n\n```text\n$ {command} --help\n{help_of(words)}\n```\n")
    return "\n".join(sections)


def main() -> int:
    """Write, or check with --check."""
    text = page()
    if "--check" in sys.argv[1:]:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print("docs/cli.md is as it would be written" if same else "docs/cli.md is old: make docs")
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
