"""Command-line options made from options dataclasses, and what `persona train --help` says of them."""

import dataclasses
import re

import click
import pytest

from persona.commands.options import click_options
from persona.core.host.errors import UsageError
from persona.core.options import flag_of, option
from persona.core.training.settings import TrainSettings
from persona.plugins.methods.dreambooth import DreamBoothOptions
from persona.runs.recipe import build_options


@dataclasses.dataclass(frozen=True)
class Sauce:
    """Options of every kind there is."""

    heat: int = option(3, help="How hot.", minimum=1, maximum=5)
    salt: float | None = option(None, help="How salty.")
    smooth: bool = option(True, help="No lumps.")
    kind: str = option("red", help="Which.", choices=("red", "green"))
    herbs: tuple[str, ...] = option(("basil",), help="What is in it.", flag="--herb")


def parsed(*words):
    """The values that click makes of words on a line."""
    found = {}
    command = click.Command("sauce", params=list(click_options(Sauce)), callback=lambda **values: found.update(values))
    command.main(list(words), standalone_mode=False)
    return found


def test_what_is_not_typed_is_none_so_that_a_recipes_value_shows_through():
    assert parsed() == {"heat": None, "salt": None, "smooth": None, "kind": None, "herbs": ()}


def test_what_is_typed_has_its_fields_type():
    line = "--heat 4 --salt 0.5 --no-smooth --kind green --herb dill --herb mint"
    assert parsed(*line.split()) == {
        "heat": 4, "salt": 0.5, "smooth": False, "kind": "green", "herbs": ("dill", "mint")
    }  # fmt: skip
    assert parsed("--smooth")["smooth"] is True


@pytest.mark.parametrize("line", ["--heat x", "--salt much", "--heat", "--herbs dill", "--smooth=3"])
def test_what_cannot_be_parsed_is_bad_use(line):
    with pytest.raises(click.UsageError):
        parsed(*line.split())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"heat": 0}, "--heat 0 is too small. Give at least --heat 1"),
        ({"heat": 9}, "--heat 9 is too large. Give at most --heat 5"),
        ({"heat": 2.5}, "--heat 2.5 is not a whole number"),
        ({"heat": True}, "--heat True is not a whole number"),
        ({"salt": "nan"}, "--salt 'nan' is not a number"),
        ({"smooth": "yes"}, "--smooth 'yes' is not true or false"),
        ({"kind": "gren"}, "--kind gren is not known. It is one of: red, green. Did you mean --kind green?"),
        ({"kind": {"a": 1}}, "is not a text"),
        ({"heat": None}, "--heat None is not a whole number"),
    ],
)
def test_values_out_of_bounds_or_of_another_type_are_refused_with_what_is_allowed(values, said):
    with pytest.raises(UsageError) as caught:
        build_options(Sauce, values)
    assert said in str(caught.value)


def test_values_of_a_recipe_become_the_fields_types():
    made = build_options(Sauce, {"heat": "4", "salt": 1, "herbs": "dill", "unrelated": 3})
    assert made == Sauce(heat=4, salt=1.0, herbs=("dill",))
    assert build_options(Sauce, {"salt": None, "herbs": ["a", "b"]}).herbs == ("a", "b")
    assert isinstance(made.salt, float)


def test_help_tells_the_default_and_a_methods_own_default_wins():
    shown = {item.name: item.help for item in click_options(Sauce, {"heat": 5})}
    assert shown["heat"] == "How hot.  [default: 5]"
    assert shown["herbs"] == "What is in it.  [default: basil]"
    assert shown["salt"] == "How salty."


def words(text):
    return " ".join(text.split())


def test_help_of_a_method_shows_each_of_its_options_with_its_help(persona_):
    answer = persona_("train", "--plugin", "dreambooth", "--help")
    assert answer.code == 0
    own, shared = answer.out.split("Options of dreambooth:")[1].split("Options of every method:")
    for field in dataclasses.fields(DreamBoothOptions):
        assert re.search(rf"^  {flag_of(field)}\b", own, re.MULTILINE), field.name
        assert words(field.metadata["help"]) in words(own)
    for field in dataclasses.fields(TrainSettings):
        assert re.search(rf"^  {flag_of(field)}\b", shared, re.MULTILINE), field.name
        assert words(field.metadata["help"]) in words(shared)


def test_help_without_a_method_shows_the_methods_and_no_ones_own_options(persona_):
    shown = persona_("train", "--help").out
    assert "dreambooth" in shown
    assert "Options of every method" in shown
    assert "--class-pictures" not in shown
    assert "Usage: persona train" in shown


@pytest.mark.parametrize(
    ("typed", "near"),
    [("--class-picture", "--class-pictures"), ("--learning-rat", "--learning-rate"), ("--dat", "--data")],
)
def test_an_unknown_option_is_answered_with_the_nearest(persona_, typed, near):
    answer = persona_("train", "--plugin", "dreambooth", typed, "3")
    assert answer.code == 2
    assert near in answer.err
    assert "Did you mean" in answer.err


def test_an_option_of_another_method_is_unknown_here(persona_):
    answer = persona_("train", "--plugin", "lora", "--class-pictures", "3", "--dry-run")
    assert answer.code == 2
    assert "No such option '--class-pictures'" in answer.err


def test_the_method_is_found_wherever_it_stands(persona_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in (["--plugin=dreambooth"], ["--method", "dreambooth"], ["--method=dreambooth"]):
        assert "Options of dreambooth" in persona_("train", "--help", *line).out
    (tmp_path / "r.yaml").write_text("method: dreambooth\n")
    assert "Options of dreambooth" in persona_("train", "r.yaml", "--help").out
    (tmp_path / "persona.yaml").write_text("method: lora\n")
    assert "Options of lora" in persona_("train", "--help").out


def test_a_methods_option_with_the_name_of_a_shared_one_is_told(persona_, plugged):
    import persona

    class Clash:
        @persona.hookimpl
        def persona_methods(self):
            return [persona.Descriptor("clash", "Clashes.", f"{__name__}:Clashing")]

    plugged(clash=Clash())
    answer = persona_("train", "--plugin", "clash", "--help")
    assert answer.code == 2
    assert "The method clash has an option steps that persona train has already." in answer.err


@dataclasses.dataclass(frozen=True)
class ClashingOptions:
    """One option of these is persona's own."""

    steps: int = option(3, help="Steps.")


class Clashing:
    """A method whose options clash."""

    Options = ClashingOptions
    name, summary, plan = "clash", "Clashes.", None
