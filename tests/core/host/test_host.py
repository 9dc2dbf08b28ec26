"""A plugin is taken whole or not at all, and a broken one is its own problem."""

import json

import pytest

import persona
from persona.core.host import hooks
from persona.core.host.descriptor import API_VERSION, Descriptor
from persona.core.host.errors import PluginError, UsageError
from persona.core.host.hooks import hookimpl
from persona.core.host.host import Candidate, Host, place_of
from persona.plugins import builtin


def candidate(name, load, package=""):
    return Candidate(name, package or f"persona-plugin-{name}", "1.0", load)


def host_with(*candidates, **options):
    return Host([("persona", builtin)], candidates=candidates, **options)


def offered(host):
    return {kind: sorted(host.provided(kind)) for kind in hooks.KINDS}


OURS = offered(host_with())


def giving(**lists):
    """A plugin object whose hook persona_<kind>s returns what it is told."""

    class Plugin:
        pass

    for hook, answer in lists.items():

        def give(self, answer=answer):
            return answer() if callable(answer) else answer

        give.__name__ = hook
        setattr(Plugin, hook, hookimpl(lambda self, give=give: give(self)))
    return Plugin()


def method(name="sticker", target="json:loads", **fields):
    return Descriptor(name, "A method.", target, **fields)


def broken(plugin, name="bad"):
    """The record of a plugin that must be broken, after checking that nothing else changed."""
    good = giving(persona_methods=[method("good-method")])
    host = host_with(candidate(name, plugin if callable(plugin) else lambda: plugin), candidate("good", lambda: good))
    record = host.records[name]
    assert record.state == "broken"
    assert record.provides == []
    assert host.records["persona"].state == host.records["good"].state == "ok"
    assert offered(host) == {**OURS, "method": sorted([*OURS["method"], "good-method"])}
    assert not host.manager.has_plugin(name)
    return record


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        ("import persona\nraise RuntimeError('no licence')\n", "RuntimeError: no licence", 2),
        ("import sys\n\nsys.exit('needs a newer Python')\n", "SystemExit: needs a newer Python", 3),
        ("def persona_methods(:\n", "SyntaxError", 1),
        ("x = 1\nimport a_package_that_nobody_has\n", "No module named 'a_package_that_nobody_has'", 2),
    ],
    ids=["raises", "exits", "syntax", "missing import"],
)
def test_a_plugin_that_fails_on_import_is_listed_with_reason_file_and_line(tmp_path, monkeypatch, text, reason, line):
    file = tmp_path / "failing_plugin.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def load():
        import importlib
        import sys

        sys.modules.pop("failing_plugin", None)
        return importlib.import_module("failing_plugin")

    record = broken(load)
    assert record.reason.startswith("cannot be imported: ")
    assert reason in record.reason
    assert record.file == f"{file}:{line}"
    assert (record.package, record.version) == ("persona-plugin-bad", "1.0")


def test_ctrl_c_during_an_import_is_the_user_and_not_the_plugin():
    def load():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host_with(candidate("slow", load))


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (giving(persona_methods="lora"), "persona_methods returned str, not a list of Descriptor"),
        (giving(persona_methods=None), "persona_methods returned NoneType, not a list of Descriptor"),
        (giving(persona_methods=["lora"]), "persona_methods returned a str in its list, not a Descriptor"),
        (giving(persona_methods=[Descriptor], ), "persona_methods returned a type in its list, not a Descriptor"),
        (giving(persona_methods=[method(name=3)]), "name 3 is not lower-case letters"),
        (giving(persona_methods=[method(name="My Method")]), "name 'My Method' is not lower-case letters"),
        (giving(persona_methods=[method(target="no colon")]), "target 'no colon' is not of the form module:attribute"),
        (giving(persona_methods=[method(), method()]), "it gives method sticker twice"),
        (giving(persona_methods=lambda: 1 / 0), "ZeroDivisionError: division by zero"),
        (giving(persona_methods=[method(api=API_VERSION + 1)]), f"version {API_VERSION + 1} of persona's API, not"),
        (giving(persona_methods=[method("lora")]), "the method name lora is taken by persona"),
        (giving(persona_trackers=[method("fine")], persona_methods=[method("lora")]), "name lora is taken by persona"),
        (giving(persona_metods=[]), "there is no hook persona_metods. Did you mean persona_methods"),
        (object(), "it implements no hook of persona (is @persona.hookimpl missing?)"),
        (json, "it implements no hook of persona"),
        (None, "it implements no hook of persona"),
    ],
)  # fmt: skip
def test_a_plugin_that_registers_garbage_is_broken_with_the_reason_and_nothing_of_it_is_taken(plugin, reason):
    assert reason in broken(lambda: plugin).reason


def test_a_plugin_whose_hook_exits_is_broken_and_the_program_lives():
    def leave():
        raise SystemExit(3)

    assert "SystemExit: 3" in broken(giving(persona_methods=leave)).reason


def test_a_forgotten_hookimpl_is_named_as_the_likely_reason():
    class Plugin:
        def persona_methods(self):
            return [method()]

    assert "is @persona.hookimpl missing?" in broken(lambda: Plugin()).reason


def test_an_argument_that_a_hook_does_not_have_is_named():
    class Plugin:
        @hookimpl
        def persona_step_done(self, run, stepp):
            pass

    assert "stepp" in broken(lambda: Plugin()).reason


def test_a_hook_wrapper_is_refused_since_it_would_never_be_called():
    class Plugin:
        @hookimpl(wrapper=True)
        def persona_step_done(self):
            return (yield)

    assert "wrapper" in broken(lambda: Plugin()).reason


def test_of_two_plugins_with_one_name_the_first_is_kept():
    first, second = giving(persona_methods=[method("one")]), giving(persona_methods=[method("two")])
    host = host_with(candidate("same", lambda: first, "package-a"), candidate("same", lambda: second, "package-b"))
    assert host.records["same"].state == "ok"
    assert host.records["same (package-b)"].state == "broken"
    assert host.records["same (package-b)"].reason == "the plugin name same is taken already by package-a"
    assert offered(host)["method"] == sorted([*OURS["method"], "one"])


def test_of_two_plugins_that_give_the_same_method_the_first_is_kept_and_named():
    first, second = giving(persona_methods=[method()]), giving(persona_methods=[method(), method("other")])
    host = host_with(candidate("first", lambda: first), candidate("second", lambda: second))
    assert host.giver("method", "sticker") == "first"
    assert host.records["second"].reason == "the method name sticker is taken by first"
    assert "other" not in host.provided("method")


def test_a_plugin_cannot_take_the_name_of_persona_itself():
    host = host_with(candidate("persona", lambda: giving(persona_methods=[method()])))
    assert host.records["persona"].state == "ok"
    assert host.records["persona (persona-plugin-persona)"].state == "broken"
    assert offered(host) == OURS


@pytest.mark.parametrize("kind", hooks.KINDS)
def test_what_a_plugin_gives_through_any_hook_is_offered_and_can_be_loaded(kind):
    target = f"{Thing.__module__}:{Thing.__name__}"
    plugin = giving(**{hooks.KINDS[kind]: [Descriptor("new-thing", "It is new.", target)]})
    host = host_with(candidate("giver", lambda: plugin))
    assert host.records["giver"].provides == [f"{kind} new-thing"]
    assert host.provided(kind)["new-thing"].summary == "It is new."
    assert host.load(kind, "new-thing") is Thing


class Thing:
    Options = plan = availability = open = start = log = finish = sniff = read = figures = score = None


class Listener:
    """Implements every event with all of its arguments."""

    def __init__(self):
        self.heard = {}

    @hookimpl
    def persona_run_started(self, run, settings):
        self.heard["persona_run_started"] = (run, settings)

    @hookimpl
    def persona_step_done(self, values, step, run):  # any order, since they are given by name
        self.heard["persona_step_done"] = (run, step, values)

    @hookimpl
    def persona_checkpoint_saved(self, run, step, checkpoint):
        self.heard["persona_checkpoint_saved"] = (run, step, checkpoint)

    @hookimpl
    def persona_sampled(self, run, step, pictures):
        self.heard["persona_sampled"] = (run, step, pictures)

    @hookimpl
    def persona_run_finished(self, product):
        self.heard["persona_run_finished"] = (product,)


@pytest.mark.parametrize(
    ("event", "values", "expected"),
    [
        ("persona_run_started", {"run": "r", "settings": {"steps": 1}}, ("r", {"steps": 1})),
        ("persona_step_done", {"run": "r", "step": 2, "values": {"loss": 0.5}}, ("r", 2, {"loss": 0.5})),
        ("persona_checkpoint_saved", {"run": "r", "step": 2, "checkpoint": "c"}, ("r", 2, "c")),
        ("persona_sampled", {"run": "r", "step": 2, "pictures": ["p"]}, ("r", 2, ["p"])),
        ("persona_run_finished", {"run": "r", "product": "p"}, ("p",)),
    ],
)
def test_every_event_reaches_every_plugin_with_the_arguments_it_names(event, values, expected):
    first, second = Listener(), Listener()
    host = host_with(candidate("one", lambda: first), candidate("two", lambda: second))
    assert host.announce(event, **values) == []
    assert first.heard == second.heard == {event: expected}


def test_kinds_and_events_are_all_the_hooks_there_are():
    assert {*hooks.KINDS.values(), *hooks.EVENTS} == {name for name in vars(hooks) if name.startswith("persona_")}


@pytest.mark.parametrize("error", [ValueError("the tracker is down"), SystemExit(1)])
def test_a_plugin_that_raises_in_an_event_is_switched_off_and_the_others_still_hear(error):
    heard = []

    class Bad:
        @hookimpl
        def persona_step_done(self, step):
            raise error

    class Good:
        @hookimpl
        def persona_step_done(self, step):
            heard.append(step)

    host = host_with(candidate("bad", lambda: Bad()), candidate("good", lambda: Good()))
    complaints = host.announce("persona_step_done", run="r", step=1, values={})
    assert complaints == [
        f"plugin bad failed in persona_step_done and was switched off: {type(error).__name__}: {error}"
    ]
    assert host.announce("persona_step_done", run="r", step=2, values={}) == []
    assert heard == [1, 2]
    assert host.records["bad"].state == "broken"
    assert host.records["bad"].file.startswith(__file__)


def test_something_that_cannot_be_imported_when_it_is_asked_for_names_its_plugin_and_the_way_round_it():
    host = host_with(candidate("late", lambda: giving(persona_methods=[method(target="a_package_nobody_has:X")])))
    assert host.records["late"].state == "ok"
    with pytest.raises(PluginError, match=r"The method sticker \(plugin late\).*a_package_nobody_has") as caught:
        host.load("method", "sticker")
    assert caught.value.hint == "Leave the plugin out: persona -p no:late …"


def test_a_method_that_is_no_method_is_named_as_its_plugins_mistake():
    host = host_with(candidate("late", lambda: giving(persona_methods=[method(target="json:JSONDecoder")])))
    with pytest.raises(PluginError, match=r"sticker \(plugin late, json:JSONDecoder\) has no Options and no plan"):
        host.load("method", "sticker")


def test_an_unknown_name_is_answered_with_the_nearest_and_with_what_is_broken():
    host = host_with(candidate("hurt", lambda: None))
    with pytest.raises(UsageError, match=r"There is no method called lorra. Did you mean lora\?.*Broken plugins: hurt"):
        host.load("method", "lorra")


def test_only_and_without_choose_among_the_installed_and_nothing_of_the_others_is_imported():
    def load():
        raise AssertionError("imported")

    plugin = giving(persona_methods=[method()])
    for options in ({"only": ["a"]}, {"without": ["b"]}):
        host = host_with(candidate("a", lambda: plugin), candidate("b", load), **options)
        assert {name: record.state for name, record in host.records.items()} == {
            "persona": "ok", "a": "ok", "b": "disabled"
        }  # fmt: skip
    assert offered(host_with(candidate("b", load), only=[])) == OURS


def test_a_switch_that_does_nothing_is_told():
    plugin = giving(persona_methods=[method()])
    host = host_with(candidate("sticker", lambda: plugin), only=["stickers"])
    assert "Did you mean sticker?" in host.records["stickers"].reason
    with pytest.raises(UsageError, match=r"There is no plugin stickers to leave out. Did you mean sticker\?"):
        host_with(candidate("sticker", lambda: plugin), without=["stickers"])
    with pytest.raises(UsageError, match="persona is persona itself"):
        host_with(without=["persona"])


def test_strict_mode_raises_what_the_plugin_raised(monkeypatch):
    monkeypatch.setenv("PERSONA_STRICT_PLUGINS", "1")

    def load():
        raise RuntimeError("no licence")

    with pytest.raises(RuntimeError, match="no licence"):
        host_with(candidate("bad", load))


def test_the_place_of_an_error_that_was_never_raised_is_empty():
    assert place_of(ValueError()) == ""


def test_hookimpl_and_descriptor_are_what_the_package_shows_to_plugins():
    assert persona.hookimpl is hookimpl
    assert persona.Descriptor is Descriptor
