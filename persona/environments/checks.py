"""Combinations that are known to break, each with the symptom it shows and what puts it right. A check is a function of
facts (facts.py) and nothing else. The versions and messages are those that were seen (docs/backends.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from persona.environments.facts import Facts, Machine, numbers

LITTLE = 2 << 30
"""Free bytes below which a disk is called nearly full."""
OLDEST = {"torch": "2.4", "diffusers": "0.35", "transformers": "4.57", "peft": "0.17", "accelerate": "1.10"}
"""The torch backend's lower bounds, as in pyproject.toml."""


@dataclass(frozen=True)
class Finding:
    """Something that is broken, or only worth knowing: the symptom as it is met, the cause, the line to type."""

    kind: Literal["broken", "note"]
    where: str
    symptom: str
    cause: str
    fix: str


Check = Callable[[Facts], Iterator[Finding]]


def diagnose(environments: Iterable[Facts], machine: Machine) -> list[Finding]:
    """Everything that is found, the broken things first."""
    found = [finding for facts in environments for check in CHECKS for finding in check(facts)]
    found += [finding for facts in environments for finding in torch_npu(facts, machine)]
    found += [finding for facts in environments for finding in idle_gpu(facts, machine)]
    found += [finding for check in MACHINE_CHECKS for finding in check(machine)]
    return sorted(found, key=lambda finding: finding.kind != "broken")


def torchvision(facts: Facts) -> Iterator[Finding]:
    """A torchvision that does not fit torch takes diffusers, transformers and peft down with it."""
    here = facts.packages.get("torchvision")
    if here is None:
        return
    wanted = next((found[1] for line in facts.wants.get("torchvision", ())
                   if (found := re.match(r"torch\s*\(?==\s*([\d.]+)", line))), "")  # fmt: skip
    torch = facts.version("torch") or ()
    causes = []
    if wanted and numbers(wanted) != torch:
        causes.append(f"torchvision {here} was built for torch {wanted}, and here is {facts.packages.get('torch')}")
    if facts.cuda.get("torchvision") != facts.cuda.get("torch"):
        built = {name: f"CUDA {facts.cuda[name]}" if facts.cuda.get(name) else "no CUDA" for name in facts.cuda}
        causes.append(f"torchvision was built for {built.get('torchvision')}, torch for {built.get('torch')}")
    complaint = facts.imports.get("torchvision", "")
    if complaint and not causes:
        causes.append("its C library cannot be loaded")
    if not complaint and "torchvision" in facts.imports:
        return  # it was tried, and works
    if causes:
        yield Finding(
            "broken", facts.where,
            complaint or "operator torchvision::nms does not exist; diffusers, transformers and peft fail too",
            "; ".join(causes),
            "pip uninstall torchvision (persona does without)",
        )  # fmt: skip


def old_torch_packages(facts: Facts) -> Iterator[Finding]:
    """Below the versions that the torch backend was written for."""
    if "torch" not in facts.packages or "diffusers" not in facts.packages:
        return  # torch for other purposes
    for package, oldest in OLDEST.items():
        found = facts.version(package)
        if found is not None and found < numbers(oldest):
            yield Finding(
                "broken", facts.where, "ImportError or unknown arguments when the torch backend opens a base",
                f"{package} {facts.packages[package]} is older than {oldest}", f"pip install '{package}>={oldest}'",
            )  # fmt: skip


def hub_against_transformers(facts: Facts) -> Iterator[Finding]:
    """transformers 5 and diffusers 0.36 and later need huggingface_hub 1."""
    hub, transformers = facts.version("huggingface-hub"), facts.version("transformers")
    if hub and transformers and transformers >= (5,) and hub < (1,):
        yield Finding(
            "broken", facts.where, "ImportError: huggingface-hub>=1.0 is required",
            f"huggingface_hub {facts.packages['huggingface-hub']} with transformers {facts.packages['transformers']}",
            "pip install 'huggingface_hub>=1'; ppdiffusers, which needs below 0.26: persona backends setup paddle",
        )  # fmt: skip


def ppdiffusers(facts: Facts) -> Iterator[Finding]:
    """What ppdiffusers and paddlenlp do not declare, and break on."""
    if "ppdiffusers" not in facts.packages:
        return
    fix = "An environment in which all fits: persona backends setup paddle"
    hub, aistudio = facts.version("huggingface-hub"), facts.version("aistudio-sdk")
    if hub is not None and hub >= (0, 26):
        name = "cached_download" if hub < (1,) else "repo_type_and_id_from_hf_id"
        yield Finding(
            "broken", facts.where, f"ImportError: cannot import name '{name}' from 'huggingface_hub'",
            f"huggingface_hub {facts.packages['huggingface-hub']}; ppdiffusers needs one below 0.26", fix,
        )  # fmt: skip
    if aistudio is not None and aistudio >= (0, 3):
        yield Finding(
            "broken", facts.where, "ImportError: cannot import name 'download' from 'aistudio_sdk.hub'",
            f"aistudio-sdk {facts.packages['aistudio-sdk']}; ppdiffusers needs one below 0.3", fix,
        )  # fmt: skip
    if "pip" not in facts.packages:
        yield Finding("broken", facts.where, "ModuleNotFoundError: No module named 'pip'",
                      "paddlenlp imports pip, which is not there", f"pip install pip. {fix}")  # fmt: skip
    if "torch" in facts.packages:
        yield Finding(
            "note", facts.where, "torch.uint16 means bfloat16, np.bool means bool",
            "importing ppdiffusers overwrites them for the whole process, and torch is installed beside it", fix,
        )  # fmt: skip


def paddle(facts: Facts) -> Iterator[Finding]:
    """paddlepaddle by itself."""
    name = next((name for name in ("paddlepaddle", "paddlepaddle-gpu") if name in facts.packages), None)
    if name is None:
        return
    if "setuptools" not in facts.packages:
        yield Finding("broken", facts.where, "ModuleNotFoundError: No module named 'setuptools'",
                      "paddle imports setuptools and does not declare it", "pip install setuptools")  # fmt: skip
    if (facts.version(name) or ()) < (3,):
        yield Finding(
            "broken", facts.where, "a crash in zlib after import paddle; no attribute 'float8_e4m3fn'",
            f"{name} {facts.packages[name]} is older than 3", "persona backends setup paddle",
        )  # fmt: skip


def mindone(facts: Facts) -> Iterator[Finding]:
    """mindone pins one version of transformers, and fails on import with transformers 5."""
    mindone = facts.version("mindone")
    if mindone is None:
        return
    fix = "persona backends setup mindspore"
    transformers, numpy = facts.version("transformers"), facts.version("numpy")
    if transformers is not None and transformers >= (5,):
        yield Finding(
            "broken", facts.where, "ImportError: cannot import name 'download_url' from 'transformers.utils'",
            f"mindone {facts.packages['mindone']} with transformers {facts.packages['transformers']}", fix,
        )  # fmt: skip
    if "ml-dtypes" not in facts.packages:
        yield Finding("broken", facts.where, "ModuleNotFoundError: No module named 'ml_dtypes'",
                      "mindone.diffusers.training_utils needs ml_dtypes and does not declare it",
                      "pip install ml_dtypes==0.5.4 numpy==1.26.4")  # fmt: skip
    if numpy is not None and numpy >= (2,) and (facts.version("mindspore") or (9,)) < (2, 10):
        yield Finding("broken", facts.where, "errors of numpy's when MindSpore is imported or computes",
                      f"mindspore {facts.packages.get('mindspore')} needs numpy below 2, and here is "
                      f"{facts.packages['numpy']}", "pip install numpy==1.26.4")  # fmt: skip
    if mindone >= (0, 4) and "torch-npu" not in facts.packages:
        yield Finding("note", facts.where, "The kernel Arange unregistered (on a cpu)",
                      f"mindone {facts.packages['mindone']} uses operators that MindSpore has for Ascend only; 0.3.0 "
                      "runs on a cpu", fix)  # fmt: skip


def flattened_text_encoders(facts: Facts) -> Iterator[Finding]:
    """transformers 5.6 and later leave `text_model.` out of a CLIP text encoder's keys."""
    found = facts.version("transformers")
    if found is not None and found >= (5, 6):
        yield Finding(
            "note", facts.where,
            "CLIPTextModel … newly initialized, and pictures that ignore the prompt, in other tools",
            f"transformers {facts.packages['transformers']} saves text encoders without `text_model.` in their keys; "
            "transformers 4, ppdiffusers and mindone read these as random weights (persona puts it back for its own)",
            "For other tools: persona convert FOLDER OUT --to diffusers",
        )  # fmt: skip


def torch_npu(facts: Facts, machine: Machine) -> Iterator[Finding]:
    """torch_npu is built for one version of torch, and needs CANN."""
    found, torch = facts.version("torch-npu"), facts.version("torch")
    if found is None:
        return
    if torch is not None and found[:2] != torch[:2]:
        minor = ".".join(str(number) for number in torch[:2])
        yield Finding(
            "broken", facts.where, "undefined symbol, or torch has no attribute npu",
            f"torch_npu {facts.packages['torch-npu']} with torch {facts.packages['torch']}: their first two numbers "
            "have to be equal", f"pip install 'torch_npu=={minor}.*'",
        )  # fmt: skip
    if not machine.ascend:
        yield Finding(
            "broken", facts.where,
            facts.imports.get("torch_npu") or "libhccl.so: cannot open shared object file: No such file or directory",
            "CANN, Ascend's toolkit, is not there or not on its paths (ASCEND_HOME_PATH)",
            "source /usr/local/Ascend/ascend-toolkit/set_env.sh",
        )  # fmt: skip
    elif complaint := facts.imports.get("torch_npu"):
        yield Finding("broken", facts.where, complaint, "torch_npu cannot be imported",
                      "Take the CANN that its release notes name: gitcode.com/Ascend/pytorch")  # fmt: skip


def idle_gpu(facts: Facts, machine: Machine) -> Iterator[Finding]:
    """A GPU that torch cannot use."""
    if facts.where == "here" and machine.nvidia and facts.cuda.get("torch") == "":
        yield Finding("note", "here", "runs are slow: device auto takes the cpu",
                      "there is an NVIDIA driver, and this torch was built without CUDA",
                      "pip install --force-reinstall torch (from pip's own index)")  # fmt: skip


def folders(machine: Machine) -> Iterator[Finding]:
    """Folders that persona writes to."""
    variables = {"environments": "PERSONA_DATA", "cache": "PERSONA_CACHE"}
    for purpose, (path, complaint, free) in machine.folders.items():
        other = f"Name another folder: {variables[purpose]}=/a/folder" if purpose in variables else "Change to another"
        if complaint:
            yield Finding("broken", "machine", f"{path} cannot be written", complaint, other)
        elif free < LITTLE:
            yield Finding("note", "machine", f"The disk is full ({purpose})",
                          f"{path} has {free / 2**30:.1f} GiB free", f"Make room. {other}")  # fmt: skip


def environments(machine: Machine) -> Iterator[Finding]:
    """Environments of frameworks that are there and cannot be used."""
    for name, found in machine.environments.items():
        if not found.is_usable and found.state != "missing":
            yield Finding("broken", name, f"--backend {name} is refused", found.reason, found.hint)


def plugins(machine: Machine) -> Iterator[Finding]:
    """Plugins that could not be taken."""
    for name, reason in machine.plugins:
        yield Finding("broken", "here", f"what the plugin {name} gives is not there", reason,
                      f"Leave it out: persona -p no:{name} …, or ask its makers")  # fmt: skip


CHECKS: tuple[Check, ...] = (
    torchvision, old_torch_packages, hub_against_transformers, ppdiffusers, paddle, mindone, flattened_text_encoders,
)  # fmt: skip
MACHINE_CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (folders, environments, plugins)
