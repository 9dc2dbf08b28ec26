"""Where tensors live: the one module that knows cpu and Ascend apart."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass

import mindspore as ms

from persona.core.host.capabilities import EVERYWHERE
from persona.core.host.errors import BackendMissing, UsageError, did_you_mean
from persona.core.sampling.samplers import SAMPLERS
from persona.plugins.backends.shared.memory import free_main_memory, largest_process

KINDS = ("cpu", "npu")
DTYPES = {"fp32": ms.float32, "bf16": ms.bfloat16, "fp16": ms.float16}


@dataclass(frozen=True)
class Device:
    """A device that is there: `kind` is cpu or npu (Ascend), `number` which one."""

    kind: str
    number: int = 0

    @property
    def name(self) -> str:
        """cpu, npu:0, npu:1, …"""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.number}"

    def make_current(self) -> None:
        """Let MindSpore compute here. On a cpu one operation after the other: queueing them in threads of its own, as
        MindSpore does by default, takes 10 to 20 times as long on two cores."""
        ms.set_context(mode=ms.PYNATIVE_MODE)
        if self.kind == "cpu":
            ms.set_device("CPU")
            ms.runtime.launch_blocking()
            _take_threads(_processors())
        else:
            ms.set_device("Ascend", self.number)

    def peak_memory(self) -> int:
        """The most bytes that tensors took so far; on a cpu, that this process did. 0 where it cannot be asked."""
        if self.kind != "cpu":
            return int(ms.runtime.max_memory_allocated())
        return largest_process()

    def empty_cache(self) -> None:
        """Let go of what nobody holds. What MindSpore keeps beyond the end of the process is told about there, cell by
        cell."""
        gc.collect()


def _processors() -> int:
    """How many processors this process may use, or OMP_NUM_THREADS where that is said."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdigit() and int(told):
        return int(told)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _take_threads(count: int) -> None:
    """MindSpore's own choice is 25 threads a kernel. It can be told once in a process."""
    if not ms._c_expression.RuntimeConf.get_instance().is_op_threads_num_configured():
        ms.device_context.cpu.op_tuning.threads_num(count)


def present_devices() -> list[str]:
    """Names of the devices of this machine, the one "auto" takes first."""
    ascend = ms.device_context.ascend
    count = ascend.device_count() if ascend.is_available() else 0
    return [*(f"npu:{number}" for number in range(count)), "cpu"]


def find_device(name: str) -> Device:
    """The device called "auto", "cpu", "npu", "npu:1", or "ascend" for "npu".

    Raises UsageError for a name that is none of these, BackendMissing for a device that is not there."""
    kind, _, number = name.lower().replace("ascend", "npu").partition(":")
    if kind in ("cuda", "mps"):
        raise BackendMissing(f"The MindSpore backend runs on cpu and on Ascend (npu), not on {name}.",
                             hint="Take another backend or device: --backend torch, or --device cpu")  # fmt: skip
    if kind != "auto" and (kind not in KINDS or (number and not number.isdigit())):
        raise UsageError(f'There is no device called "{name}".',
                         hint=f"{did_you_mean(kind, ('auto', *KINDS))} For example: --device auto")  # fmt: skip
    present = present_devices()
    wanted = present[0] if kind == "auto" else kind if kind == "cpu" else f"{kind}:{number or 0}"
    if wanted not in present:
        raise BackendMissing(f"{wanted} was asked for, and MindSpore finds only {', '.join(present)} here.",
                             hint=f"Take another one: --device {present[0]}")  # fmt: skip
    kind, _, number = wanted.partition(":")
    return Device(kind, int(number or 0))


def capabilities(device: Device) -> dict[str, bool]:
    """What a session can do on `device`. MindSpore has no bf16 matrix product for a cpu. Nothing was ever run on an
    Ascend here: what is True there is what MindSpore documents."""
    return EVERYWHERE | {
        "bf16": device.kind == "npu",
        "fp16": True,
        "devices": True,
        "sharding": False,
        "gradient_checkpointing": True,
        "compile": True,
        "dora": True,
        **{f"sampler:{name}": True for name in SAMPLERS},
    }


def free_memory(device: Device) -> int:
    """Bytes that are free in this machine for a cpu; 0 for an Ascend, which is not asked."""
    return free_main_memory() if device.kind == "cpu" else 0
