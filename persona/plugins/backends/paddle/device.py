"""Where tensors live: the one module that knows Paddle's cpu and gpu apart. Outside, a gpu is called cuda, as on the
other backends."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import paddle

from persona.core.host.capabilities import EVERYWHERE
from persona.core.host.errors import BackendMissing, UsageError, did_you_mean
from persona.core.sampling.samplers import SAMPLERS
from persona.plugins.backends.shared.memory import free_main_memory, largest_process

KINDS = ("cpu", "cuda")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Device:
    """A device that is there: "cpu" or "cuda:<number>"."""

    name: str

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.name.partition(":")[0]

    @property
    def paddle_name(self) -> str:
        """What Paddle calls it: cpu or gpu:<number>."""
        return self.name.replace("cuda", "gpu")

    def make_current(self) -> None:
        """Make it the device that new tensors live on. Paddle has one for the whole process."""
        paddle.set_device(self.paddle_name)

    def autocast(self, precision: str) -> Any:
        """Context in which matrix products and convolutions run in `precision`, and sums that need it in fp32."""
        if precision == "fp32":
            return nullcontext()
        return paddle.amp.auto_cast(enable=True, level="O1", dtype=DTYPES[precision])

    def peak_memory(self) -> int:
        """The most bytes that tensors took so far; on a cpu, that this process did."""
        return int(paddle.device.cuda.max_memory_allocated()) if self.kind == "cuda" else largest_process()

    def empty_cache(self) -> None:
        """Give memory of dead tensors back."""
        gc.collect()
        if self.kind == "cuda":
            paddle.device.cuda.empty_cache()


def present_devices() -> list[str]:
    """Names of the devices of this machine, the one "auto" takes first."""
    count = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    return [*(f"cuda:{number}" for number in range(count)), "cpu"]


def find_device(name: str) -> Device:
    """The device called "auto", "cpu", "cuda" or "cuda:1".

    Raises UsageError for a name that is none of these, BackendMissing for a device that is not there.
    """
    kind, _, number = name.partition(":")
    if kind in ("npu", "mps"):
        raise UsageError(f"The paddle backend does not run on {kind}.", hint="--device auto, or --backend torch")
    if kind != "auto" and (kind not in KINDS or (number and not number.isdigit())):
        near = "Did you mean cuda?" if kind == "gpu" else did_you_mean(kind, ("auto", *KINDS))
        raise UsageError(f'There is no device called "{name}".', hint=f"{near} For example: --device auto")
    present = present_devices()
    if kind == "auto":
        return Device(present[0])
    wanted = "cpu" if kind == "cpu" else f"cuda:{number or 0}"
    if wanted not in present:
        why = "" if paddle.is_compiled_with_cuda() else " (this paddlepaddle was built without CUDA)"
        raise BackendMissing(f"{name} was asked for, and here there is only {', '.join(present)}{why}.",
                             hint=f"Take another one: --device {present[0]}")  # fmt: skip
    return Device(wanted)


def capabilities(device: Device) -> dict[str, bool]:
    """What a session can do on `device`. On a cpu Paddle's autocast does nothing ("amp_guard can only be enabled on
    CUDAPlace, XPUPlace, and CustomPlace … it makes no effect"), and its convolution has no kernel for 16 bits."""
    on_gpu = device.kind == "cuda"
    return {
        **EVERYWHERE,
        "bf16": on_gpu and bool(paddle.amp.is_bfloat16_supported()),
        "fp16": on_gpu and bool(paddle.amp.is_float16_supported()),
        "gradient_checkpointing": True,
        "compile": True,
        "dora": True,
        "fused_adamw": False,
        "flash_attention": False,
        "devices": True,
        "sharding": False,
        **{f"sampler:{name}": True for name in SAMPLERS},
    }


def free_memory(device: Device) -> int:
    """Bytes that are free on a device, or in this machine for a cpu; 0 where it cannot be asked."""
    if device.kind == "cpu":
        return free_main_memory()
    ask = getattr(paddle.device.cuda, "mem_get_info", None)
    return int(ask(int(device.name.partition(":")[2]))[0]) if ask else 0
