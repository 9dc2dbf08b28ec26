"""An NPU that is not there: PyTorch's Python backend for private devices, renamed npu, whose tensors are kept on the
cpu and say they are on npu:0. A cpu tensor that gets among them is refused, as a real device would.

Registration is for the whole process and cannot be taken back, so tests use it in a process of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NPU = torch.device("cpu")  # replaced by `install`
_CROSSING = ("aten.copy_.", "aten._to_copy.", "aten._copy_from.", "aten.set_.")
_libraries: list[Any] = []


class NpuTensor(torch.Tensor):
    """A tensor that says it is on npu:0; `inner` holds its values."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> NpuTensor:
        """Wrap a cpu tensor."""
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=NPU,
        )
        wrapper.inner = inner.detach()
        return wrapper

    def __repr__(self) -> str:
        """As a tensor, with its device."""
        return f"NpuTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do on the cpu what was asked for, and call the result npu's unless it was asked for on the cpu."""
        crosses = str(func).startswith(_CROSSING)
        kwargs = dict(kwargs or {})
        to_cpu = "device" in kwargs and kwargs["device"] is not None and torch.device(kwargs["device"]).type == "cpu"
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False

        def unwrap(value: Any) -> Any:
            if isinstance(value, NpuTensor):
                return value.inner
            if isinstance(value, torch.Tensor) and value.dim() > 0 and not crosses:
                raise RuntimeError(f"{func}: expected all tensors on npu:0, but one of {list(value.shape)} is on cpu")
            return value

        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if str(func).startswith("aten.copy_.") or (func._schema.name.endswith("_") and args and result is not None):
            return args[0]
        if "out" in kwargs:
            return kwargs["out"]
        return result if to_cpu else tree_map(lambda v: NpuTensor(v) if type(v) is torch.Tensor else v, result)


class NpuModule(backend_registration._DummyBackendModule):
    """torch.npu; of the first generation when `has_bf16` is False."""

    has_bf16 = True

    def synchronize(self) -> None:
        """Nothing is queued."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What autocast may be asked for."""
        return [torch.float16, torch.bfloat16]

    def is_bf16_supported(self) -> bool:
        """From the 910B on."""
        return self.has_bf16


LOWER = ("linear", "matmul", "bmm", "addmm", "conv2d", "scaled_dot_product_attention")
FULL = ("layer_norm", "group_norm", "softmax.int")
"""What autocast computes in the lower precision and in fp32; every backend registers its own list, torch_npu as well
(torch_npu/csrc/aten/common/AutoCastOps.cpp). These are those that a diffusion model meets."""


def _autocast(library: Any, name: str, dtype_of: Any) -> None:
    overload = name.partition(".")[2] or "default"
    function = getattr(getattr(torch.ops.aten, name.partition(".")[0]), overload)

    def cast(value: Any) -> Any:
        return value.to(dtype_of()) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("npu", enabled=False):
            args, kwargs = tree_map(cast, (args, kwargs))
            return function(*args, **kwargs)

    library.impl(name, run, "AutocastPrivateUse1")


def install() -> None:
    """Make `torch.device("npu")` and `torch.npu` exist."""
    global NPU
    backend_registration._setup_privateuseone_for_python_backend(rename="npu", backend_module=NpuModule())
    NPU = torch.device("npu:0")
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
              memory_format: Any = None) -> torch.Tensor:  # fmt: skip
        return NpuTensor(torch.empty(size, dtype=dtype, device="cpu"))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None,
                      pin_memory: Any = None) -> torch.Tensor:  # fmt: skip
        return NpuTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def copy_from(source: Any, destination: Any, non_blocking: bool = False) -> Any:
        held = [value.inner if isinstance(value, NpuTensor) else value for value in (source, destination)]
        held[1].copy_(held[0])
        return destination

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # what is in neither list
    _libraries.append(others)
    for name in LOWER:
        _autocast(library, name, lambda: torch.get_autocast_dtype("npu"))
    for name in FULL:
        _autocast(library, name, lambda: torch.float32)
    _libraries.append(library)
