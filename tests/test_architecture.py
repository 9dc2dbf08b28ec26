"""Arrows run one way: which room of the house may import which, read off every import statement."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "persona"
FRAMEWORKS = {
    "torch", "torch_npu", "torchvision", "diffusers", "transformers", "peft", "accelerate",
    "paddle", "ppdiffusers", "paddlenlp", "mindspore", "mindone",
}  # fmt: skip
ALLOWED = {
    "core": {"core"},
    "formats": {"core", "formats"},
    "hub": {"core", "hub"},
    "plugins": {"core", "formats", "hub", "plugins"},
    "exchange": {"core", "formats", "hub", "plugins", "exchange", "api"},
    "environments": {"core", "hub", "environments", "api"},
    "runs": {"core", "formats", "hub", "plugins", "exchange", "environments", "runs", "api"},
    "api": {"core", "formats", "hub", "plugins", "exchange", "runs"},
    "commands": {"core", "formats", "hub", "plugins", "exchange", "environments", "runs", "api", "commands", "cli"},
    "cli": {"core", "api", "commands"},
}
"""The rooms each room may import from (docs/architecture.md). `persona` itself, for its version, is open to all."""


def imports_of(file: Path) -> Iterator[str]:
    """Every dotted name a module imports, wherever in it, except what only the type checker reads."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    unread: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            unread |= {inner for statement in node.body for inner in ast.walk(statement)}
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides which room is meant"
            yield node.module or ""


MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    """The top folder (or file) of the package that a module is in."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_is_known() -> None:
    assert {room_of(file) for file in MODULES} - {"__init__", "__main__"} == set(ALLOWED)


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = [file for file in MODULES if room_of(file) == room]
    assert files
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files
        for name in imports_of(file)
        if name.startswith("persona.") and name.split(".")[1] not in ALLOWED[room]
    ]
    assert wrong == []


def test_a_framework_is_imported_inside_backends_and_scorers_only() -> None:
    users = {
        file.relative_to(PACKAGE).as_posix()
        for file in MODULES
        if any(name.partition(".")[0] in FRAMEWORKS for name in imports_of(file))
    }
    assert users  # the torch backend does
    allowed = ("plugins/backends/", "plugins/scorers/")  # a scorer judges finished pictures, with a model of its own
    assert [user for user in users if not user.startswith(allowed)] == []


def test_nothing_unpickles_evaluates_or_loads_unsafe_yaml() -> None:
    forbidden = {
        "pickle.load",
        "pickle.loads",
        "torch.load",
        "eval",
        "exec",
        "yaml.load",
        "marshal.loads",
        "shelve.open",
    }
    found = [
        f"{file.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node.func)}"
        for file in MODULES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in forbidden
    ]
    assert found == []
