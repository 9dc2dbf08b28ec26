"""Where tensors live: the one module that knows cpu, cuda, mps and npu apart."""

from __future__ import annotations

import gc
import importlib.util
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from persona.core.host.capabilities import EVERYWHERE
from persona.core.host.errors import BackendMissing, UsageError, did_you_mean
from persona.core.sampling.samplers import SAMPLERS
from persona.plugins.backends.shared.memory import free_main_memory, largest_process
from persona.plugins.backends.torch import npu

KINDS = ("cpu", "cuda", "mps", "npu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FUSED_ADAMW = ("cpu", "cuda")


@dataclass(frozen=True)
class Memory:
    """Bytes of a device: in use by this process's tensors, free, and altogether. 0 where it cannot be asked."""

    used: int = 0
    free: int = 0
    total: int = 0


@dataclass(frozen=True)
class Device:
    """A device that is there."""

    name: torch.device

    @property
    def kind(self) -> str:
        """cpu, cuda, mps or npu."""
        return self.name.type

    @property
    def fused_adamw(self) -> bool:
        """Whether torch's fused AdamW kernel runs here."""
        return self.kind in _FUSED_ADAMW

    def synchronise(self) -> None:
        """Wait for what was queued. Nothing is queued on a cpu."""
        if self.kind != "cpu":
            _module(self.kind).synchronize()

    def memory(self) -> Memory:
        """How full the device is."""
        module = _module(self.kind)
        used = module.memory_allocated() if hasattr(module, "memory_allocated") else 0
        free, total = module.mem_get_info() if hasattr(module, "mem_get_info") else (0, 0)
        return Memory(int(used), int(free), int(total))

    def peak_memory(self) -> int:
        """The most bytes that tensors took so far; on a cpu, that this process did. 0 where it cannot be asked."""
        module = _module(self.kind)
        if self.kind != "cpu":
            return int(module.max_memory_allocated()) if hasattr(module, "max_memory_allocated") else 0
        return largest_process()

    def autocast(self, precision: str) -> Any:
        """Context in which matrix products and convolutions run in `precision`, and sums that need it in fp32."""
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.kind, dtype=PRECISIONS[precision])

    def prepare(self) -> None:
        """What has to be set before the first tensor is there."""
        if self.kind == "npu":
            npu.keep_plain_layout()

    def make_current(self) -> None:
        """Make it the device that this process means when it says no number."""
        module = _module(self.kind)
        if self.kind != "cpu" and hasattr(module, "set_device"):
            module.set_device(self.name)

    def empty_cache(self) -> None:
        """Give memory of dead tensors back."""
        gc.collect()
        module = _module(self.kind)
        if self.kind != "cpu" and hasattr(module, "empty_cache"):
            module.empty_cache()


def present_devices() -> list[str]:
    """Names of the devices of this machine, the one "auto" takes first."""
    names = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if _npu_is_there():
        names += [f"npu:{n}" for n in range(_module("npu").device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def find_device(name: str) -> Device:
    """The device called "auto", "cpu", "cuda", "cuda:1", "mps", "npu" or "npu:1".

    Raises UsageError for a name that is none of these, BackendMissing for a device that is not there.
    """
    kind, _, number = name.partition(":")
    if kind != "auto" and (kind not in KINDS or (number and not number.isdigit())):
        near = "Did you mean cuda?" if kind == "gpu" else did_you_mean(kind, ("auto", *KINDS))
        raise UsageError(f'There is no device called "{name}".', hint=f"{near} For example: --device auto")
    present = present_devices()
    if kind == "auto":
        return Device(torch.device(present[0]))
    wanted = name if number or kind in ("cpu", "mps") else f"{kind}:0"
    if kind == "cpu":
        wanted = "cpu"
    if wanted not in present:
        raise BackendMissing(f"{name} was asked for, and here there is only {', '.join(present)}{_why_not(kind)}.",
                             hint=f"Take another one: --device {present[0]}")  # fmt: skip
    return Device(torch.device(wanted))


def capabilities(device: Device) -> dict[str, bool]:
    """What a session can do on `device`."""
    if device.kind == "cpu":
        brain = True
    elif device.kind == "npu":
        brain = npu.has_bf16()
    else:
        supported = getattr(_module(device.kind), "is_bf16_supported", None)
        brain = bool(supported()) if supported else False
    return EVERYWHERE | {
        "bf16": brain,
        "fp16": True,
        "devices": device.kind != "mps",
        "sharding": device.kind in ("cpu", "cuda"),
        "gradient_checkpointing": True,
        "compile": device.kind in ("cpu", "cuda"),
        "dora": True,
        "fused_adamw": device.fused_adamw or (device.kind == "npu" and npu.fused_adamw()[0] is not None),
        "flash_attention": device.kind == "npu" and npu.has_flash_attention(),
        **{f"sampler:{name}": True for name in SAMPLERS},
    }


def free_memory(device: Device) -> int:
    """Bytes that are free on a device, or in this machine for a cpu; 0 where it cannot be asked."""
    if device.kind != "cpu":
        return device.memory().free
    return free_main_memory()


def _module(kind: str) -> Any:
    """torch.cuda, torch.mps, torch.npu or torch.cpu."""
    return getattr(torch, kind)


def _npu_is_there() -> bool:
    """Whether torch knows an NPU, through torch_npu when that is installed."""
    if not hasattr(torch, "npu"):
        npu.library()
    return hasattr(torch, "npu") and bool(torch.npu.is_available())


def _why_not(kind: str) -> str:
    if kind == "npu" and importlib.util.find_spec("torch_npu") is None:
        return " (torch_npu is not installed)"
    if kind == "cuda" and torch.version.cuda is None:
        return " (this torch was built without CUDA)"
    return ""
