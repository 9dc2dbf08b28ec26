"""The command line as a whole: verbs, exit codes, and what an error looks like."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import persona
from persona.core.host.errors import BaseModelError, Interrupted, UsageError
from persona.plugins.builtin import persona_commands

ROOT = Path(__file__).parents[1]
VERBS = {found.name: found.summary for found in persona_commands()}
RAISED = {
    "base": BaseModelError("The base is broken.", hint="Fetch it again: persona models get X"),
    "use": UsageError("That cannot be.", hint="--steps 3"),
    "bare": BaseModelError("Nothing can be done."),
    "stopped": Interrupted("Stopped after step 3.", hint="Go on"),
    "interrupt": KeyboardInterrupt(),
    "memory": MemoryError(),
    "disk": OSError(28, "No space left on device", "/data/x"),
    "bug": ZeroDivisionError("division by zero"),
    "exit": click.exceptions.Exit(7),
    "abort": click.Abort(),
}


@click.command()
@click.argument("what")
def fail(what):
    """Raise what is asked for."""
    raise RAISED[what]


class Failing:
    """A plugin with a verb that fails as it is told."""

    @persona.hookimpl
    def persona_commands(self):
        return [persona.Descriptor("fail", "Fails.", f"{__name__}:fail")]


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("base", 1, "error: The base is broken.\n  Fetch it again: persona models get X\n"),
        ("use", 2, "error: That cannot be.\n  --steps 3\n"),
        ("bare", 1, "error: Nothing can be done.\n"),
        ("stopped", 130, "Stopped after step 3.\n  Go on\n"),
        ("interrupt", 130, "\ninterrupted\n"),  # below the ^C that the terminal shows
        ("abort", 130, "interrupted\n"),
        ("memory", 1, "error: Out of memory.\n  Lower it: --batch 1, or smaller pictures: --width 256\n"),
        ("disk", 1, "error: No space left on device: /data/x\n  See where: add --debug\n"),
        ("bug", 1, "error: unexpected ZeroDivisionError: division by zero\n"
                   "  This is a bug in persona or a plugin. See where: add --debug\n"),
        ("exit", 7, ""),
    ],
)  # fmt: skip
def test_every_failure_has_its_exit_code_and_no_traceback(persona_, plugged, what, code, said):
    plugged(failing=Failing())
    answer = persona_("fail", what)
    assert (answer.code, answer.out, answer.err) == (code, "", said)


@pytest.mark.parametrize("line", [["--debug", "fail", "base"], ["fail", "base", "--debug"]])
def test_debug_anywhere_on_the_line_shows_the_traceback(persona_, plugged, line):
    plugged(failing=Failing())
    with pytest.raises(BaseModelError, match="The base is broken"):
        persona_(*line)


def test_debug_can_be_a_variable(persona_, plugged, monkeypatch):
    plugged(failing=Failing())
    monkeypatch.setenv("PERSONA_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        persona_("fail", "bug")


def test_help_lists_every_verb_with_its_line_and_the_first_thing_to_type(persona_):
    answer = persona_("--help")
    assert answer.code == 0
    assert {"train", "generate", "convert", "inspect", "data", "plugins"} <= set(VERBS)
    for verb, line in VERBS.items():
        assert f"\n  {verb} " in answer.out
        assert line in " ".join(answer.out.split())
    assert "Start here: persona train --plugin dreambooth" in answer.out
    assert persona_("-h").out == answer.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(persona_, verb):
    answer = persona_(verb, "--help")
    assert answer.code == 0, answer.err
    assert answer.out.startswith(f"Usage: persona {verb}")


def test_a_verb_that_does_not_exist_is_answered_with_the_nearest(persona_):
    answer = persona_("generat")
    assert answer.code == 2
    assert answer.err.splitlines()[0].startswith("error: No such command 'generat'.")
    assert "Did you mean generate" in answer.err
    assert answer.err.splitlines()[1] == "  See what there is: persona --help"


def test_a_verb_of_a_plugin_cannot_take_the_place_of_one_of_personas_own(persona_, plugged):
    class Thief:
        @persona.hookimpl
        def persona_commands(self):
            return [persona.Descriptor("train", "Steals.", f"{__name__}:fail")]

    plugged(thief=Thief())
    assert "Steals" not in persona_("--help").out
    listed = persona_("plugins")
    assert listed.code == 1
    assert "the command name train is taken by persona" in listed.out


def test_the_module_is_the_command_and_a_reader_that_goes_away_is_no_error_message():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PERSONA_PLUGINS": ""}
    version = subprocess.run(
        [sys.executable, "-m", "persona", "--version"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (version.returncode, version.stdout) == (0, f"persona {persona.__version__}\n")
    gone = subprocess.run(
        f"{sys.executable} -u -m persona train --plugin lora --help | true",
        shell=True, capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip
    assert "Traceback" not in gone.stderr
    assert "error" not in gone.stderr


def test_without_a_verb_the_help_is_shown(persona_):
    answer = persona_()
    assert "Usage: persona" in answer.out + answer.err
    assert "train" in answer.out + answer.err


def test_public_names_are_listed_and_an_unknown_one_is_an_attribute_error():
    assert {"load", "save", "train", "resume", "generate", "convert", "inspect", "PersonaError"} <= set(dir(persona))
    for name in persona.__all__:
        assert getattr(persona, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = persona.lode
