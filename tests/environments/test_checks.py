"""What `persona doctor` finds when facts are planted, and that it finds nothing where nothing is wrong."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from persona.environments import checks
from persona.environments.checks import OLDEST, Finding, diagnose
from persona.environments.facts import Facts, Machine, facts_of, numbers, why_not_imported, why_not_writable
from persona.environments.frameworks import FRAMEWORKS
from persona.environments.state import Found

ROOT = Path(__file__).parents[2]
TORCH = {"torch": "2.13.0+cpu", "diffusers": "0.42.1", "transformers": "5.5.0", "peft": "0.21.2",
         "accelerate": "1.15.0", "huggingface-hub": "2.4.0"}  # fmt: skip
PADDLE = FRAMEWORKS["paddle"].pinned()
MINDSPORE = FRAMEWORKS["mindspore"].pinned()
ROOMY = Machine({"cache": ("/home/me/.cache", "", 50 << 30)}, ascend="/usr/local/Ascend")


def found(facts: Facts, machine: Machine = ROOMY) -> list[Finding]:
    return diagnose([facts], machine)


@pytest.mark.parametrize("packages", [TORCH, PADDLE, MINDSPORE, {}], ids=["torch", "paddle", "mindspore", "bare"])
def test_sound_environments_have_no_findings(packages: dict[str, str]) -> None:
    assert found(Facts(packages=packages, cuda={"torch": ""} if "torch" in packages else {})) == []


# What was seen on a machine, with the message that it gave (docs/backends.md).
BROKEN = {
    "a CUDA torchvision beside a CPU torch": (
        Facts(packages=TORCH | {"torchvision": "0.28.0"}, cuda={"torch": "", "torchvision": "13.0"}),
        "torchvision::nms does not exist", "built for CUDA 13.0, torch for no CUDA", "pip uninstall torchvision",
    ),
    "a torchvision for another torch": (
        Facts(packages=TORCH | {"torchvision": "0.29.2"}, wants={"torchvision": ("numpy", "torch==2.14.0")}),
        "torchvision::nms", "built for torch 2.14.0, and here is 2.13.0", "pip uninstall torchvision",
    ),
    "a torchvision that cannot be imported": (
        Facts(packages=TORCH | {"torchvision": "0.28.0"}, imports={"torchvision": "OSError: libcudart.so.13"}),
        "OSError: libcudart.so.13", "C library", "pip uninstall torchvision",
    ),
    "an old peft": (Facts(packages=TORCH | {"peft": "0.9.1"}), "ImportError", "peft 0.9.1 is older than 0.17", "pip"),
    "an old transformers": (
        Facts(packages=TORCH | {"transformers": "4.46.3"}), "ImportError", "4.46.3 is older than 4.57", "pip install",
    ),
    "transformers 5 with an old hub": (
        Facts(packages=TORCH | {"huggingface-hub": "0.25.2"}), "huggingface-hub>=1.0", "0.25.2", "huggingface_hub>=1",
    ),
    "ppdiffusers with the hub that its pins resolve to": (
        Facts(packages=PADDLE | {"huggingface-hub": "2.4.0"}),
        "cannot import name 'repo_type_and_id_from_hf_id'", "below 0.26", "persona backends setup paddle",
    ),
    "ppdiffusers with a hub between": (
        Facts(packages=PADDLE | {"huggingface-hub": "0.36.2"}), "name 'cached_download'", "0.36.2", "backends setup",
    ),
    "ppdiffusers with a new aistudio-sdk": (
        Facts(packages=PADDLE | {"aistudio-sdk": "0.3.1"}), "'download' from 'aistudio_sdk.hub'", "below 0.3", "setup",
    ),
    "paddle without setuptools": (
        Facts(packages={"paddlepaddle": "3.3.1"}), "No module named 'setuptools'", "declare", "pip install setuptools",
    ),
    "paddlenlp without pip": (
        Facts(packages={key: value for key, value in PADDLE.items() if key != "pip"}),
        "No module named 'pip'", "paddlenlp imports pip", "pip install pip",
    ),
    "an old paddle": (
        Facts(packages={"paddlepaddle": "2.6.2", "setuptools": "1"}), "zlib", "older than 3", "backends setup paddle",
    ),
    "mindone with transformers 5": (
        Facts(packages=MINDSPORE | {"transformers": "5.23.0", "huggingface-hub": "2.4.0"}),
        "cannot import name 'download_url'", "transformers 5.23.0", "persona backends setup mindspore",
    ),
    "mindone without ml_dtypes": (
        Facts(packages={key: value for key, value in MINDSPORE.items() if key != "ml-dtypes"}),
        "No module named 'ml_dtypes'", "declare", "ml_dtypes==0.5.4",
    ),
    "mindspore 2.7 with numpy 2": (
        Facts(packages=MINDSPORE | {"numpy": "2.4.6"}), "numpy", "needs numpy below 2", "numpy==1.26.4",
    ),
    "torch_npu for another torch": (
        Facts(packages=TORCH | {"torch-npu": "2.5.1.post1"}), "undefined symbol", "2.5.1", "torch_npu==2.13.*",
    ),
}  # fmt: skip


@pytest.mark.parametrize("planted", BROKEN.values(), ids=BROKEN)
def test_a_broken_combination_is_told_by_its_symptom(planted: tuple[Facts, str, str, str]) -> None:
    facts, symptom, cause, fix = planted
    (finding,) = [finding for finding in found(facts) if finding.kind == "broken"]
    assert symptom in finding.symptom
    assert cause in finding.cause
    assert fix in finding.fix


def test_a_torchvision_that_works_is_left_alone() -> None:
    facts = Facts(packages=TORCH | {"torchvision": "0.28.0"}, imports={"torchvision": ""},
                  cuda={"torch": "", "torchvision": "13.0"})  # fmt: skip
    assert found(facts) == []


def test_torch_npu_without_cann_says_what_to_source() -> None:
    facts = Facts(packages=TORCH | {"torch-npu": "2.13.0"}, imports={"torch_npu": "ImportError: libhccl.so"})
    (finding,) = found(facts, replace(ROOMY, ascend=""))
    assert finding.symptom == "ImportError: libhccl.so"
    assert "set_env.sh" in finding.fix
    (finding,) = found(facts)  # CANN is there, and it is another one
    assert "cannot be imported" in finding.cause


def test_notes_are_no_breakage() -> None:
    facts = Facts(packages=TORCH | {"transformers": "5.23.0"}, cuda={"torch": ""})
    assert [finding.kind for finding in found(facts, replace(ROOMY, nvidia=True))] == ["note", "note"]


def test_folders_environments_and_plugins(tmp_path: Path) -> None:
    half = Found("half built", tmp_path, "its environment is half built", "persona backends setup paddle")
    machine = Machine(
        {"cache": ("/ro", "/ro may not be written to", 50 << 30), "environments": ("/full", "", 1 << 20)},
        environments={"paddle": half, "mindspore": Found("missing", tmp_path)},
        plugins=(("shouting", "cannot be imported: ImportError: no module"),),
    )
    told = {finding.symptom: finding for finding in diagnose([], machine)}
    assert told["/ro cannot be written"].fix == "Name another folder: PERSONA_CACHE=/a/folder"
    assert told["The disk is full (environments)"].kind == "note"
    assert told["--backend paddle is refused"].fix == "persona backends setup paddle"
    assert told["what the plugin shouting gives is not there"].cause == "cannot be imported: ImportError: no module"
    assert len(told) == 4  # an environment that was never asked for is nothing broken


def test_the_lower_bounds_are_those_that_are_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = re.findall(r"^torch = \[(.*)\]$", text, re.MULTILINE)
    assert dict(re.findall(r'"([\w-]+)>=([\d.]+)"', line)) == OLDEST


def test_every_check_is_asked() -> None:
    written = set(re.findall(r"^def (\w+)\(.*Iterator\[Finding\]", Path(checks.__file__).read_text(), re.MULTILINE))
    asked = {check.__name__ for check in (*checks.CHECKS, *checks.MACHINE_CHECKS)} | {"torch_npu", "idle_gpu"}
    assert written == asked


def test_facts_are_read_from_metadata(tmp_path: Path) -> None:
    for name, version, more in (
        ("Torch_NPU", "2.5.1", ""),
        ("torchvision", "0.28.0", "Requires-Dist: torch==2.13.0\n"),
    ):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "version.py").write_text("__version__ = '0.28.0+cu130'\ncuda = '13.0'\n")
    facts = facts_of("there", Path(sys.executable), [str(tmp_path)], probe=())
    assert facts.packages == {"torch-npu": "2.5.1", "torchvision": "0.28.0"}
    assert facts.wants["torchvision"] == ("torch==2.13.0",)
    assert facts.cuda == {"torchvision": "13.0"}
    assert numbers("4.46.3.post1+cpu") == (4, 46, 3)


def test_an_import_is_tried_elsewhere() -> None:
    assert why_not_imported(Path(sys.executable), "tabnanny") == ""
    assert "tabnanny" not in sys.modules
    assert "No module named 'no_such_thing'" in why_not_imported(Path(sys.executable), "no_such_thing")
    assert "takes more than 0 s" in why_not_imported(Path(sys.executable), "tabnanny", seconds=0.0001)


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert why_not_writable(tmp_path / "file" / "inside") == f"{tmp_path / 'file'} is a file"
    assert why_not_writable(tmp_path / "new" / "folder") == ""
