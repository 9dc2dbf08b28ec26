"""The plugin host: who is here, what they give, and who is broken and why.

A plugin is taken whole or not at all: when it fails to import, registers something that is not a Descriptor, clashes in
a name or was made for another version of the contracts, it is listed as broken with its reason and file, and nothing
else changes."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pluggy

from persona.core.host import hooks
from persona.core.host.descriptor import API_VERSION, Descriptor
from persona.core.host.errors import PluginError, UsageError, did_you_mean

ENTRY_POINT_GROUP = "persona"
PluginState = Literal["ok", "broken", "disabled"]


@dataclass
class PluginRecord:
    """One plugin as `persona plugins` lists it. `provides` are "kind name" pairs; `reason` tells why it is broken."""

    name: str
    package: str = ""
    version: str = ""
    state: PluginState = "ok"
    reason: str = ""
    file: str = ""
    provides: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Candidate:
    """A plugin before it is loaded: its name, distribution, and how to import it."""

    name: str
    package: str
    version: str
    load: Callable[[], Any]


NEEDED: dict[str, tuple[str, ...]] = {
    "method": ("Options", "plan"),
    "backend": ("availability", "open"),
    "tracker": ("start", "log", "finish"),
    "scorer": ("figures", "score"),
    "container": ("sniff", "read"),
}
"""What the thing behind a Descriptor must have, by kind, so that a plugin's mistake is named as one."""


class _Refused(Exception):
    """Why a plugin is not taken."""


def _is_announced(group: str) -> bool:
    """Whether some distribution on the path has entry points of this group. Mostly none has, and importlib.metadata
    alone takes a quarter of the time of `persona --help`."""
    sign = f"[{group}]".encode()
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")  # noqa: PTH208
        except NotADirectoryError:
            return True  # an archive: only importlib.metadata can look into it
        except OSError:
            continue
        for name in names:
            if name.endswith((".dist-info", ".egg-info", ".egg")):
                inside = "EGG-INFO" if name.endswith(".egg") else ""
                try:
                    with open(os.path.join(folder, name, inside, "entry_points.txt"), "rb") as file:  # noqa: PTH118, PTH123
                        if sign in file.read():
                            return True
                except OSError:
                    continue
    return False


def installed_candidates() -> list[Candidate]:
    """The plugins that installed distributions announce in the entry-point group `persona`."""
    if not _is_announced(ENTRY_POINT_GROUP):
        return []
    from importlib.metadata import entry_points

    found = []
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        distribution = entry.dist
        found.append(
            Candidate(
                entry.name,
                distribution.name if distribution else "",
                distribution.version if distribution else "",
                entry.load,
            )
        )
    return sorted(found, key=lambda candidate: (candidate.name, candidate.package))


def place_of(error: BaseException) -> str:
    """`file:line` of the innermost frame of an exception; of the text itself for a SyntaxError."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def fault_of(descriptor: Descriptor) -> str:
    """What is wrong with a Descriptor's own fields, in words; empty when nothing is."""
    if not isinstance(descriptor.name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._+-]*", descriptor.name):
        return f"name {descriptor.name!r} is not lower-case letters, digits and hyphens"
    if not isinstance(descriptor.summary, str):
        return f"summary {descriptor.summary!r} is not a text"
    if not isinstance(descriptor.target, str) or not re.fullmatch(r"[\w.]+:[\w.]+", descriptor.target):
        return f"target {descriptor.target!r} is not of the form module:attribute"
    return ""


class Host:
    """Holds the registered plugins. `builtins` are modules with hookimpls; the rest comes from entry points.

    `only` restricts third-party plugins to those names (the variable PERSONA_PLUGINS; an empty list disables all),
    `without` disables some (`-p no:NAME`).
    """

    def __init__(
        self,
        builtins: Iterable[tuple[str, Any]],
        *,
        candidates: Iterable[Candidate] | None = None,
        only: Iterable[str] | None = None,
        without: Iterable[str] = (),
    ) -> None:
        self.manager = pluggy.PluginManager(hooks.PROJECT)
        self.manager.add_hookspecs(hooks)
        self.records: dict[str, PluginRecord] = {}
        self._found: dict[str, dict[str, Descriptor]] = {kind: {} for kind in hooks.KINDS}
        self._giver: dict[tuple[str, str], str] = {}
        for name, module in builtins:
            self.register(module, PluginRecord(name, "persona"))
            if self.records[name].state == "broken":  # our own mistake: never hide it
                raise PluginError(f"built-in plugin {name}: {self.records[name].reason}")
        own = set(self.records)
        allowed = None if only is None else set(only)
        refused = set(without)
        for candidate in installed_candidates() if candidates is None else candidates:
            record = PluginRecord(candidate.name, candidate.package, candidate.version)
            if candidate.name in refused or (allowed is not None and candidate.name not in allowed):
                record.state, record.reason = "disabled", "switched off"
                self.records[record.name] = record
                continue
            self._load(candidate, record)
        for name in sorted((allowed or set()) - set(self.records)):
            reason = f"PERSONA_PLUGINS names it, and nothing installed is called so. {did_you_mean(name, self.records)}"
            self.records[name] = PluginRecord(name, state="broken", reason=reason.strip())
        self._check_switched_off(refused, own)

    def _check_switched_off(self, names: set[str], own: set[str]) -> None:
        """A switch that does nothing is a typing error, and is told."""
        for name in sorted(names):
            if name in own:
                raise UsageError(
                    f"{name} is persona itself and cannot be left out.", hint="List plugins: persona plugins"
                )
            if name not in self.records:
                known = set(self.records) - own
                raise UsageError(
                    f"There is no plugin {name} to leave out. {did_you_mean(name, known)}".strip(),
                    hint="List plugins: persona plugins",
                )

    def _load(self, candidate: Candidate, record: PluginRecord) -> None:
        if candidate.name in self.records:
            taken = self.records[candidate.name].package or "another plugin"
            record.state, record.reason = "broken", f"the plugin name {candidate.name} is taken already by {taken}"
            record.name = f"{candidate.name} ({candidate.package})"
            self.records[record.name] = record
            return
        try:
            plugin = candidate.load()
        except (Exception, SystemExit) as error:
            if os.environ.get("PERSONA_STRICT_PLUGINS"):
                raise
            record.state, record.file = "broken", place_of(error)
            record.reason = f"cannot be imported: {type(error).__name__}: {error}"
            self.records[record.name] = record
            return
        self.register(plugin, record)

    def register(self, plugin: Any, record: PluginRecord) -> None:
        """Take a plugin (module or object with hookimpls), whole or not at all."""
        self.records[record.name] = record
        record.file = record.file or getattr(plugin, "__file__", "") or ""
        try:
            self.manager.register(plugin, name=record.name)
            given = self._collect(plugin, record.name)
        except (Exception, SystemExit) as error:
            if self.manager.has_plugin(record.name):
                self.manager.unregister(name=record.name)
            if os.environ.get("PERSONA_STRICT_PLUGINS"):
                raise
            record.state = "broken"
            record.reason = str(error) if isinstance(error, _Refused) else f"{type(error).__name__}: {error}"
            if not isinstance(error, _Refused | pluggy.PluginValidationError):
                record.file = place_of(error)
            return
        for kind, descriptor in given:
            self._found[kind][descriptor.name] = descriptor
            self._giver[kind, descriptor.name] = record.name
            record.provides.append(f"{kind} {descriptor.name}")

    def _collect(self, plugin: Any, name: str) -> list[tuple[str, Descriptor]]:
        known = {*hooks.KINDS.values(), *hooks.EVENTS}
        given: list[tuple[str, Descriptor]] = []
        implemented = 0
        for attribute in dir(plugin):
            if not attribute.startswith("persona_"):
                continue
            options = self.manager.parse_hookimpl_opts(plugin, attribute)
            if options is None:
                continue
            if options.get("wrapper") or options.get("hookwrapper"):
                raise _Refused(f"{attribute} is a hook wrapper; persona's hooks are called plainly")
            implemented += 1
            if attribute not in known:
                raise _Refused(f"there is no hook {attribute}. {did_you_mean(attribute, known)}")
        if not implemented:
            raise _Refused("it implements no hook of persona (is @persona.hookimpl missing?)")
        for kind, hook_name in hooks.KINDS.items():
            for implementation in getattr(self.manager.hook, hook_name).get_hookimpls():
                if implementation.plugin_name != name:
                    continue
                given += [(kind, item) for item in self._checked(kind, hook_name, implementation.function())]
        names = [(kind, descriptor.name) for kind, descriptor in given]
        for key in names:
            if names.count(key) > 1:
                raise _Refused(f"it gives {key[0]} {key[1]} twice")
        return given

    def _checked(self, kind: str, hook_name: str, answer: Any) -> list[Descriptor]:
        if not isinstance(answer, list | tuple):
            raise _Refused(f"{hook_name} returned {type(answer).__name__}, not a list of Descriptor")
        for item in answer:
            if not isinstance(item, Descriptor):
                raise _Refused(f"{hook_name} returned a {type(item).__name__} in its list, not a Descriptor")
            if fault := fault_of(item):
                raise _Refused(f"{hook_name} returned a Descriptor whose {fault}")
            if item.api != API_VERSION:
                raise _Refused(
                    f"{kind} {item.name} was made for version {item.api} of persona's API, not {API_VERSION}"
                )
            if item.name in self._found[kind]:
                raise _Refused(f"the {kind} name {item.name} is taken by {self._giver[kind, item.name]}")
        return list(answer)

    def provided(self, kind: str) -> dict[str, Descriptor]:
        """The descriptors of one kind by name, in the order they were registered."""
        return dict(self._found[kind])

    def giver(self, kind: str, name: str) -> str:
        """The plugin that gives something."""
        return self._giver[kind, name]

    def load(self, kind: str, name: str) -> Any:
        """The thing itself. Raises UsageError for an unknown name, PluginError when its import fails."""
        known = self._found[kind]
        if name not in known:
            raise UsageError(
                f"There is no {kind} called {name}. {did_you_mean(name, known)}{self._broken_note()}",
                hint="List what is here: persona plugins",
            )
        plugin = self._giver[kind, name]
        hint = f"Leave the plugin out: persona -p no:{plugin} …"
        if self.records[plugin].package == "persona":
            hint = "Is it installed whole? pip install --force-reinstall persona"
        try:
            loaded = known[name].load()
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"The {kind} {name} (plugin {plugin}) cannot be loaded: {type(error).__name__}: {error} "
                f"({place_of(error)}).",
                hint=hint,
            ) from error
        lacking = [attribute for attribute in NEEDED.get(kind, ()) if not hasattr(loaded, attribute)]
        if lacking:
            raise PluginError(
                f"The {kind} {name} (plugin {plugin}, {known[name].target}) has no {' and no '.join(lacking)}.",
                hint=hint,
            )
        return loaded

    def _broken_note(self) -> str:
        broken = [record.name for record in self.records.values() if record.state == "broken"]
        return f" Broken plugins: {', '.join(broken)}." if broken else ""

    def announce(self, event: str, **values: Any) -> list[str]:
        """Tell every plugin of a run event. A plugin that raises is unregistered; its name and reason are returned."""
        complaints = []
        for implementation in getattr(self.manager.hook, event).get_hookimpls():
            if os.environ.get("PERSONA_TRACE"):
                print(f"persona: {event} -> {implementation.plugin_name}", file=sys.stderr)
            try:
                implementation.function(*(values[name] for name in implementation.argnames))
            except (Exception, SystemExit) as error:
                name, record = implementation.plugin_name, self.records[implementation.plugin_name]
                record.state, record.file = "broken", place_of(error)
                record.reason = f"failed in {event}: {type(error).__name__}: {error}"
                self.manager.unregister(name=name)
                complaints.append(
                    f"plugin {name} failed in {event} and was switched off: {type(error).__name__}: {error}"
                )
        return complaints

    def as_table(self) -> list[Mapping[str, Any]]:
        """Every plugin as a plain mapping, for `persona plugins --json`."""
        return [vars(record) for record in self.records.values()]
