"""What the documents say is so: hooks, commands and flags, the command reference, links."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from persona.cli import cli
from persona.core.host import contracts, hooks
from persona.core.host.host import Host, PluginRecord

ROOT = Path(__file__).parents[1]
HOOKS = (*hooks.KINDS.values(), *hooks.EVENTS)


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language in a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {heading}"
    return found.group(2)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that modules can be imported from, forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == tmp_path:
            del sys.modules[name]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_an_example_that_plugs_in(hook: str, modules: Path) -> None:
    (example,) = code_blocks(section((ROOT / "docs" / "plugins.md").read_text(encoding="utf-8"), hook), "python")
    file = re.match(r"# (\w+)\.py\n", example)
    assert file, "an example begins with its file's name"
    (modules / f"{file[1]}.py").write_text(example, encoding="utf-8")
    host = Host([], candidates=[])
    host.register(importlib.import_module(file[1]), PluginRecord(file[1]))
    record = host.records[file[1]]
    assert (record.state, record.reason) == ("ok", "")
    (implementation,) = getattr(host.manager.hook, hook).get_hookimpls()
    assert implementation.plugin_name == file[1]
    kinds = {given: kind for kind, given in hooks.KINDS.items()}
    if hook in kinds:
        ((name, _),) = host.provided(kinds[hook]).items()
        assert host.load(kinds[hook], name) is not None


@pytest.mark.parametrize(
    ("page", "module", "name", "contract"),
    [
        ("add-a-method.md", "biases", "Biases", contracts.Method),
        ("add-a-backend.md", "biased", "BiasedBackend", contracts.Backend),
        ("add-a-backend.md", "biased", "BiasedSession", contracts.Session),
        ("add-a-format.md", "json_tensors", "JsonTensors", contracts.Container),
        ("add-a-format.md", "arrows", "Arrows", contracts.Dialect),
        ("plugins.md", "shouting", "Shouting", contracts.Dialect),
        ("plugins.md", "telling", "Telling", contracts.Tracker),
        ("plugins.md", "brightness", "Brightness", contracts.Scorer),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_example_has_everything_its_contract_asks_for(
    page: str, module: str, name: str, contract: type, modules: Path
) -> None:
    for block in code_blocks((ROOT / "docs" / page).read_text(encoding="utf-8"), "python"):
        if block.startswith(f"# {module}.py\n"):
            (modules / f"{module}.py").write_text(block, encoding="utf-8")
    example = getattr(importlib.import_module(module), name)
    asked = {word for word in (*vars(contract), *contract.__annotations__) if not word.startswith("_")}
    assert sorted(word for word in asked if not hasattr(example, word)) == []


def test_the_table_of_hooks_names_them_all() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`(\w+)`\]", text, re.MULTILINE) == list(hooks.KINDS.values())


@pytest.mark.parametrize("page", ["add-a-method.md", "add-a-format.md", "add-a-backend.md"])
def test_the_worked_examples_pass_their_own_tests(page: str, tmp_path: Path) -> None:
    blocks = code_blocks((ROOT / "docs" / page).read_text(encoding="utf-8"), "python")
    names = [re.match(r"# (\w+\.py)\n", block) for block in blocks]
    assert all(names)
    assert any(name[1].startswith("test_") for name in names if name)
    for name, block in zip(names, blocks, strict=True):
        assert name
        (tmp_path / name[1]).write_text(block, encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stdout[-3000:]


PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/*/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "cli.md"
)


def command_lines(page: Path) -> list[str]:
    """The shell lines of a page: those of fenced blocks without a language, and inline code, that run something."""
    text = page.read_text(encoding="utf-8")
    fenced = [line for block in code_blocks(text, "(?:sh|bash|text)?") for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [line.strip() for line in (*fenced, *inline)]


def test_the_pages_are_found() -> None:
    assert {"README.md", "README_zh.md", "CONTRIBUTING.md", "getting-started.md"} <= {page.name for page in PAGES}
    assert "persona train --plugin dreambooth" in "\n".join(command_lines(ROOT / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_persona_command_of_a_page_exists_with_its_flags(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "persona-plugin-cross-attention"))
    for line in command_lines(page):
        if re.match(r"persona [a-z]+( |$)", line):
            words = shlex.split(line.replace("--plugin NAME", "--plugin lora"), comments=True)[1:]
            assert not unknown_words(words), line


def unknown_words(words: list[str]) -> list[str]:
    """What persona does not know in a command: its verb, its inner verb, or flags."""
    command: click.Command | None = cli
    context = click.Context(cli, info_name="persona")
    while isinstance(command, click.Group) and words:
        name, words = words[0], words[1:]
        command = command.get_command(context, name)
        if command is None:
            return [name]
    assert command is not None
    if "cross-attention" in words:  # the example plugin's own options, when it is not installed
        words = [word for word in words if word not in ("--class", "cross-attention", "--plugin")]
    with command.make_context("persona", list(words), parent=context, resilient_parsing=True) as inner:
        known = {
            flag for parameter in command.get_params(inner) for flag in (*parameter.opts, *parameter.secondary_opts)
        }
    flags = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    return [flag for flag in flags if flag not in known]


def test_a_misspelt_flag_or_verb_would_be_noticed() -> None:
    assert unknown_words(["trian"]) == ["trian"]
    assert unknown_words(["train", "--plugin", "dreambooth", "--clas", "dog"]) == ["--clas"]
    assert unknown_words(["train", "--plugin", "dreambooth", "--class", "dog", "--seed", "3"]) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_of_a_page_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {word for line in command_lines(page) for word in re.findall(r"^(?:\w+=\S+ )*make ([a-z]+)", line)}
    assert used <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_chinese_readme_says_the_same_commands() -> None:
    def commands(name: str) -> list[str]:
        blocks = code_blocks((ROOT / name).read_text(encoding="utf-8"), "")
        return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if "─" not in line]

    def typed(name: str) -> list[str]:
        return [line for line in commands(name) if line.startswith(("make", "git", "persona", "."))]

    assert typed("README_zh.md") == typed("README.md")
    assert len(typed("README.md")) >= 4


def test_the_command_reference_is_what_help_prints() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "tools.docs.cli_reference", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
