"""Setting environments up with an installer that obeys the test: whole, cut short, without network, without room."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from persona.core.host.errors import BackendMissing, OutputExists, UnwritableOutput, UsageError
from persona.environments import frameworks, setup
from persona.environments.frameworks import FRAMEWORKS, Framework, framework_called, untested
from persona.environments.places import data_folder, environment_folder
from persona.environments.setup import bytes_in, failure, find_python, remove, set_up, throw_away
from persona.environments.smoke import check_versions
from persona.environments.state import find

INSTALLER = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
for last in "$@"; do :; done
if [ "$1" = venv ]; then mkdir -p "$last/bin"; cp "{python}" "$last/bin/python"; exit 0; fi
case "$INSTALLER" in
  network) echo "error: Failed to fetch: https://index/simple/"; echo "  Caused by: dns error"; exit 2;;
  disk) echo "error: failed to write: No space left on device (os error 28)"; exit 2;;
  odd) echo "error: no wheel for this planet"; exit 1;;
  slow) echo "Downloading framework (700.0MiB)"; sleep 60;;
esac
echo "Installed 3 packages in 1s"
"""


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stub_python: Path) -> Framework:
    """A framework called stub, whose installer is a script: `uv` on the path."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "uv").write_text(INSTALLER.replace("{python}", str(stub_python)))
    (programs / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PERSONA_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("INSTALLER", raising=False)
    (programs / "stub.txt").write_text(f"# pins\nnumpy=={np.__version__}\n")
    monkeypatch.setattr(frameworks, "PINS", programs)
    stub = Framework("stub", "A stub", {"numpy": np.__version__}, ("3.11",), 1 << 20, 2 << 20)
    monkeypatch.setitem(FRAMEWORKS, "stub", stub)
    return stub


def nothing(line: str) -> None:
    """Nobody listens."""


def test_it_is_built_tried_and_marked_ready(framework: Framework, tmp_path: Path) -> None:
    said: list[str] = []
    assert find(framework).state == "missing"
    told = set_up(framework, said.append)
    assert "A stub: downloads 1 MiB, takes 2 MiB on disk" in said  # before anything is fetched
    assert f"in {tmp_path / 'data' / 'environments' / 'stub'}" in said
    assert "Installed 3 packages in 1s" in said
    venv, install = (tmp_path / "programs" / "calls").read_text().splitlines()
    folder = environment_folder("stub")
    assert venv.endswith(str(folder))
    assert install == f"pip install --python {folder}/bin/python --no-deps -r {tmp_path}/programs/stub.txt"
    assert told["version"] == np.__version__
    assert told["capabilities"]["cpu"]["bf16"] is False
    assert told["worker"]["frameworks_loaded"] == []
    found = find(framework)
    assert (found.state, found.told) == ("ready", told)
    assert json.loads((folder / "ready.json").read_text()) == told
    assert set_up(framework, said.append) == told  # the second time there is nothing to do
    assert len((tmp_path / "programs" / "calls").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("how", "error", "said", "hint"),
    [
        ("network", BackendMissing, "cannot be reached: error: Failed to fetch", "persona backends setup stub"),
        ("disk", UnwritableOutput, "The disk is full", "PERSONA_DATA=/another/folder"),
        ("odd", BackendMissing, "no wheel for this planet", "setup.log"),
    ],
)
def test_why_an_installer_gave_up_is_told_and_the_next_one_goes_on(
    how: str, error: type[Exception], said: str, hint: str, framework: Framework, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTALLER", how)
    with pytest.raises(error, match=said) as told:
        set_up(framework, nothing)
    assert hint in told.value.hint  # type: ignore[attr-defined]
    assert find(framework).state == "half built"
    monkeypatch.delenv("INSTALLER")
    set_up(framework, nothing)
    assert find(framework).state == "ready"


def test_a_build_that_is_killed_is_half_built_and_is_begun_anew(framework: Framework, tmp_path: Path) -> None:
    code = (
        "import sys; from persona.environments import frameworks, setup; from pathlib import Path\n"
        f"frameworks.PINS = Path({str(tmp_path / 'programs')!r})\n"
        "stub = frameworks.Framework('stub', 'A stub', {}, ('3.11',), 1, 1)\n"
        "setup.set_up(stub, lambda line: print(line, flush=True))"
    )
    builder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "INSTALLER": "slow"},
        start_new_session=True,
    )  # fmt: skip
    assert builder.stdout is not None
    for line in builder.stdout:
        if line.startswith("Downloading"):
            break
    with pytest.raises(BackendMissing, match="Another process is setting stub up"):
        set_up(framework, nothing)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.wait()
    builder.stdout.close()
    found = find(framework)
    assert (found.state, found.is_usable, found.hint) == ("half built", False, "persona backends setup stub")
    said: list[str] = []
    set_up(framework, said.append)
    assert any("half built: beginning anew" in line for line in said)
    assert find(framework).state == "ready"


def test_other_pins_make_it_outdated(framework: Framework, tmp_path: Path) -> None:
    set_up(framework, nothing)
    (tmp_path / "programs" / "stub.txt").write_text("numpy==0.1\n")
    found = find(framework)
    assert (found.state, found.is_usable, found.hint) == ("outdated", False, "persona backends setup stub")


def test_capabilities_are_asked_again_when_the_backend_has_changed(
    framework: Framework, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(framework, nothing)
    assert find(framework).told["capabilities"]["cpu"]["ema"] is False
    monkeypatch.setattr("persona.environments.state.source_digest", lambda name: "another")
    found = find(framework)
    assert (found.state, "capabilities" in found.told) == ("ready", False)


def test_a_picture_that_cannot_be_made_is_no_environment(
    framework: Framework, monkeypatch: pytest.MonkeyPatch, stub_python: Path
) -> None:
    broken = stub_python.parent / "broken"
    broken.write_text("#!/bin/sh\necho 'no framework here' >&2\nexit 3\n")
    broken.chmod(0o755)
    uv = Path(str(setup.find_uv()))
    uv.write_text(uv.read_text().replace(str(stub_python), str(broken)))
    with pytest.raises(
        BackendMissing, match=r"(?s)was built, and does not work.*exit code 3.*no framework here"
    ) as told:
        set_up(framework, nothing)
    assert "persona doctor" in told.value.hint
    assert find(framework).state == "half built"


def test_a_version_that_is_not_the_pinned_one() -> None:
    paddle = FRAMEWORKS["paddle"]
    check_versions(paddle, dict(paddle.packages))
    with pytest.raises(BackendMissing, match=r"ppdiffusers 0\.24\.1, not 0\.29\.0 and paddlenlp missing"):
        check_versions(paddle, {"paddlepaddle": "3.3.1", "ppdiffusers": "0.24.1"})


def test_a_disk_that_is_too_small_is_refused_before(framework: Framework, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda place: SimpleNamespace(free=(3 << 20) - 1))
    with pytest.raises(UnwritableOutput, match=r"needs 3 MiB with its download, and .* has 3 MiB free"):
        set_up(framework, nothing)
    assert not environment_folder("stub").exists()


def test_a_folder_of_somebody_else_is_not_touched(framework: Framework) -> None:
    folder = environment_folder("stub")
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    for attempt in (lambda: set_up(framework, nothing), lambda: remove(framework), lambda: throw_away(folder)):
        with pytest.raises(OutputExists, match="persona has not made it"):
            attempt()
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_a_python_of_ones_own_is_taken_as_it_is(
    framework: Framework, monkeypatch: pytest.MonkeyPatch, stub_python: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("PERSONA_STUB_PYTHON", str(stub_python))
    assert find(framework).state == "own"
    with pytest.raises(BackendMissing, match="nothing to set up") as told:
        set_up(framework, nothing)
    assert told.value.hint.endswith("unset PERSONA_STUB_PYTHON")
    monkeypatch.setenv("PERSONA_STUB_PYTHON", str(tmp_path / "gone"))
    assert (find(framework).state, find(framework).is_usable) == ("own missing", False)


def test_a_python_that_the_pins_have_wheels_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = "{}.{}".format(*sys.version_info)
    assert find_python(Framework("stub", "A stub", {}, (here,), 1, 1)) == sys.executable
    monkeypatch.setenv("PATH", str(tmp_path))
    stand_in = tmp_path / "python9.9"
    stand_in.write_text("#!/bin/sh\necho 'version 9.9 is not installed' >&2\nexit 127\n")
    stand_in.chmod(0o755)
    with pytest.raises(BackendMissing, match=rf"needs Python 9\.9; this is {here}, and no other") as told:
        find_python(Framework("stub", "A stub", {}, ("9.9",), 1, 1))
    assert "pip install uv" in told.value.hint
    stand_in.write_text("#!/bin/sh\nexit 0\n")
    assert find_python(Framework("stub", "A stub", {}, ("9.9",), 1, 1)) == str(stand_in)


def test_versions_that_were_not_tested_are_told() -> None:
    paddle = dict(FRAMEWORKS["paddle"].packages)
    assert untested("paddle", paddle) == ""
    assert untested("paddle", {**paddle, "paddlepaddle": "3.3.2"}) == ""  # a patch
    assert untested("paddle", {"paddlepaddle-gpu": "3.3.1", "ppdiffusers": "0.29.0", "paddlenlp": "2.8.1"}) == ""
    told = untested("paddle", {**paddle, "paddlepaddle": "3.4.0", "ppdiffusers": "0.24.1"})
    assert told.startswith("not tested with paddlepaddle 3.4.0 (tested: 3.3.1) and ppdiffusers 0.24.1 (tested: 0.29.0)")
    assert told.endswith("persona backends setup paddle")
    assert untested("torch", {"torch": "1.0"}) == ""


@pytest.mark.parametrize("name", ["paddle", "mindspore"])
def test_the_pins_are_whole_and_ship_with_the_package(name: str) -> None:
    framework = FRAMEWORKS[name]
    pinned = framework.pinned()
    assert {package: pinned[package] for package in framework.packages} == dict(framework.packages)
    assert {"click", "pluggy", "rich", "numpy", "ml-dtypes", "safetensors", "pillow", "pyyaml"} <= set(pinned)
    assert not {"torch", "torchvision", "persona"} & set(pinned)
    assert framework.disk_bytes > 1 << 30
    assert framework.download_bytes > 100 << 20


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("padle", "to set up. Did you mean paddle?"),
        ("torch", "to set up. Torch lives in persona's own environment."),
        ("tensorflow", "to set up. Known: mindspore, paddle."),
    ],
)
def test_a_name_that_is_none(name: str, said: str) -> None:
    with pytest.raises(UsageError, match="There is no environment of") as told:
        framework_called(name)
    assert told.value.message.endswith(said)


def test_where_the_data_folder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_DATA", "/somewhere")
    assert data_folder() == Path("/somewhere")
    monkeypatch.delenv("PERSONA_DATA")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert data_folder() == Path("/xdg/persona")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert data_folder() == Path.home() / ".local" / "share" / "persona"


def test_pips_words_for_no_network_are_known(framework: Framework, tmp_path: Path) -> None:
    said = "ERROR: Could not find a version that satisfies the requirement paddle==3 (from versions: none)"
    assert "cannot be reached" in failure(framework, said, tmp_path / "log").message


def test_a_file_with_two_names_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    os.link(tmp_path / "a", tmp_path / "b")
    assert bytes_in(tmp_path) == 1000


def test_the_verb(framework: Framework, persona_: Callable[..., Any], stub_is_known: None, monkeypatch: Any) -> None:
    monkeypatch.delenv("PERSONA_STUB_PYTHON")
    monkeypatch.setattr("stub.StubBackend.availability", lambda self: setup_missing())
    listed = json.loads(persona_("backends", "--json").out)
    (missing,) = [told for told in listed["backends"] if told["name"] == "stub"]
    assert (missing["usable"], missing["state"], missing["hint"]) == (False, "missing", "persona backends setup stub")
    answer = persona_("backends")
    assert "stub       not usable: its environment is not set up (downloads 1 MiB, takes 2 MiB)" in answer.out
    assert persona_("train", "--plugin", "full", "--backend", "stub").err.endswith("persona backends setup stub\n")
    assert persona_("backends", "remove", "stub").code == 1
    answer = persona_("backends", "setup", "stub")
    assert answer.code == 0, answer.err
    assert f"stub {np.__version__} is ready: {environment_folder('stub')}" in answer.out
    answer = persona_("backends", "--json")
    table, columns = json.loads(answer.out)["table"], json.loads(answer.out)["columns"]
    place = columns.index("stub cpu")
    told = {
        typed: table[typed][place] for typed in ("full", "--ema-decay", "--precision bf16", "--sampler lcm", "lora")
    }
    assert told == {"full": "yes", "--ema-decay": "no", "--precision bf16": "no", "--sampler lcm": "no", "lora": "?"}
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    answer = persona_("backends", "remove", "stub")
    assert (answer.code, answer.err.splitlines()[-1].strip()) == (2, "Say so: persona backends remove stub --yes")
    assert persona_("backends", "remove", "stub", "--yes").code == 0
    assert not environment_folder("stub").exists()
    assert persona_("backends", "setup", "padle").code == 2


def setup_missing() -> Any:
    """A backend whose framework is not here."""
    from persona.core.host.contracts import Availability

    return Availability(False, reason="not installed: stubs", hint="pip install stubs")


def test_doctor_finds_half_built_environments(
    framework: Framework, persona_: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTALLER", "odd")
    with pytest.raises(BackendMissing):
        set_up(framework, nothing)
    answer = persona_("doctor")
    assert answer.code == 1
    assert "broken (stub): --backend stub is refused" in answer.out
    answer = persona_("doctor", "--json")
    (finding,) = [told for told in json.loads(answer.out)["findings"] if told["where"] == "stub"]
    assert finding["fix"] == "persona backends setup stub"
    assert persona_("backends", "remove", "stub", "--yes").code == 0
    assert persona_("doctor").code == 0
