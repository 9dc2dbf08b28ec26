"""`persona plugins`, and what a broken plugin changes elsewhere: nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click

from persona.core.host.descriptor import Descriptor
from persona.core.host.hooks import hookimpl

ROOT = Path(__file__).parents[2]


class Sticker:
    """Gives a verb and a method."""

    @hookimpl
    def persona_commands(self):
        return [Descriptor("stick", "Stick it somewhere.", f"{__name__}:stick")]

    @hookimpl
    def persona_methods(self):
        return [Descriptor("sticker", "Stickers.", "json:loads")]


@click.command()
@click.argument("where")
def stick(where):
    """Stick it somewhere."""
    click.echo(f"stuck to {where}")


def fails():
    raise RuntimeError("no licence")


def test_broken_plugins_are_listed_with_reason_and_file_and_the_exit_code_says_so(persona_, plugged):
    plugged(sticker=Sticker(), bad=fails)
    answer = persona_("plugins")
    assert answer.code == 1
    assert "sticker (persona-plugin-sticker 1.0): ok\n  gives method sticker\n  gives command stick\n" in answer.out
    line = fails.__code__.co_firstlineno + 1
    assert "bad (persona-plugin-bad 1.0): broken\n  cannot be imported: RuntimeError: no licence\n" in answer.out
    assert f"  at {__file__}:{line}\n" in answer.out
    assert answer.err == ""


def test_the_list_as_json_has_a_record_a_plugin(persona_, plugged):
    plugged(sticker=Sticker(), bad=fails)
    answer = persona_("plugins", "--json")
    assert answer.code == 1
    records = {record["name"]: record for record in json.loads(answer.out)}
    assert set(records) == {"persona", "sticker", "bad"}
    assert records["sticker"]["provides"] == ["method sticker", "command stick"]
    assert records["bad"]["state"] == "broken"
    assert set(records["bad"]) == {"name", "package", "version", "state", "reason", "file", "provides"}


def test_without_broken_plugins_the_exit_code_is_0(persona_, plugged):
    plugged(sticker=Sticker())
    assert persona_("plugins").code == 0


def test_a_broken_plugin_changes_nothing_else(persona_, plugged):
    plugged()
    before = [persona_("--help"), persona_("train", "--help"), persona_("train", "--plugin", "lora", "--help")]
    plugged(bad=fails, garbage=lambda: None)
    assert before == [
        persona_("--help"), persona_("train", "--help"), persona_("train", "--plugin", "lora", "--help")
    ]  # fmt: skip
    assert all(answer.code == 0 for answer in before)


def test_a_plugins_verb_and_method_appear_in_the_help_and_the_verb_runs(persona_, plugged):
    plugged(sticker=Sticker())
    assert "stick  " in persona_("--help").out
    assert "Stick it somewhere." in persona_("--help").out
    assert "sticker" in persona_("train", "--help").out
    assert persona_("stick", "the fridge").out == "stuck to the fridge\n"


def test_a_plugin_can_be_left_out_by_switch_and_by_variable(persona_, plugged, monkeypatch):
    plugged(sticker=Sticker(), bad=fails)
    states = {r["name"]: r["state"] for r in json.loads(persona_("-p", "no:bad", "plugins", "--json").out)}
    assert states == {"persona": "ok", "sticker": "ok", "bad": "disabled"}
    assert persona_("-p", "no:bad", "-p", "no:sticker", "stick", "x").code == 2
    monkeypatch.setenv("PERSONA_PLUGINS", " bad ,")
    plugged(sticker=Sticker(), bad=fails)
    states = {r["name"]: r["state"] for r in json.loads(persona_("plugins", "--json").out)}
    assert states == {"persona": "ok", "sticker": "disabled", "bad": "broken"}
    monkeypatch.setenv("PERSONA_PLUGINS", "")
    plugged(sticker=Sticker(), bad=fails)
    answer = persona_("plugins", "--json")
    assert answer.code == 0
    assert {r["name"]: r["state"] for r in json.loads(answer.out)}["bad"] == "disabled"


def test_a_switch_of_another_form_or_for_nobody_is_bad_use(persona_, plugged):
    plugged(sticker=Sticker())
    answer = persona_("-p", "sticker", "plugins")
    assert (answer.code, "'sticker' is not of the form no:NAME" in answer.err) == (2, True)
    answer = persona_("-p", "no:stiker", "plugins")
    assert answer.code == 2
    assert "There is no plugin stiker to leave out. Did you mean sticker?" in answer.err


def test_a_method_of_a_plugin_that_is_not_usable_is_named_with_its_plugin(persona_, plugged):
    plugged(sticker=Sticker())
    answer = persona_("train", "--plugin", "sticker", "--dry-run")
    assert answer.code == 1
    assert "The method sticker (plugin sticker, json:loads) has no Options and no plan." in answer.err
    assert "persona -p no:sticker" in answer.err
    assert "Traceback" not in answer.err


def test_an_installed_distribution_is_found_by_its_entry_point_and_a_broken_one_beside_it_is_told(tmp_path):
    for name, text in {
        "good": "import persona\n\n@persona.hookimpl\ndef persona_methods():\n"
        "    return [persona.Descriptor('from-afar', 'A method from afar.', 'from_afar:Method')]\n",
        "evil": "import sys\nsys.exit(9)\n",
    }.items():
        (tmp_path / f"plugin_{name}.py").write_text(text)
        about = tmp_path / f"persona_plugin_{name}-2.5.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: persona-plugin-{name}\nVersion: 2.5\n")
        (about / "entry_points.txt").write_text(f"[persona]\n{name} = plugin_{name}\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}

    def persona(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "persona", *arguments], capture_output=True, text=True, env=environment, timeout=60
        )

    listed = persona("plugins", "--json")
    assert listed.returncode == 1, listed.stderr
    records = {record["name"]: record for record in json.loads(listed.stdout)}
    assert records["good"] == {
        "name": "good", "package": "persona-plugin-good", "version": "2.5", "state": "ok", "reason": "",
        "file": str(tmp_path / "plugin_good.py"), "provides": ["method from-afar"],
    }  # fmt: skip
    assert records["evil"]["reason"] == "cannot be imported: SystemExit: 9"
    assert records["evil"]["file"] == f"{tmp_path / 'plugin_evil.py'}:2"
    shown = persona("train", "--help")
    assert shown.returncode == 0
    assert "A method from afar." in shown.stdout
