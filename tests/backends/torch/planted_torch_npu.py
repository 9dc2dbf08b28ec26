"""A stand-in for torch_npu: the signatures and refusals of its `npu_fusion_attention` and `optim.NpuFusedAdamW` as
published (torch_npu 2.13: torch_npu/optim/npu_fused_adamw.py and npu_fused_optim_base.py; the documented prototype of
npu_fusion_attention), their arithmetic in plain torch. `plant()` makes `import torch_npu` find it."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

calls: dict[str, int] = {"npu_fusion_attention": 0, "step": 0, "clip": 0}


def npu_fusion_attention(
    query: Any,
    key: Any,
    value: Any,
    head_num: int,
    input_layout: str,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: Any = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
) -> tuple[Any, ...]:
    """(attention_out, softmax_max, softmax_sum, softmax_out, seed, offset, numels); here the first is real."""
    calls["npu_fusion_attention"] += 1
    if query.dtype not in (torch.float16, torch.bfloat16) or not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"npu_fusion_attention: {query.dtype}, {key.dtype}, {value.dtype} are not supported")
    if input_layout != "BNSD" or query.shape[1] != head_num or query.shape[-1] % 16:
        raise RuntimeError(f"npu_fusion_attention: {input_layout} {list(query.shape)} with {head_num} heads")
    assert pse is None and padding_mask is None and atten_mask is None and keep_prob == 1.0, "not in this stand-in"
    weights = torch.softmax(query.float() @ key.float().transpose(-1, -2) * scale, dim=-1)
    return ((weights @ value.float()).to(query.dtype), None, None, None, 0, 0, 0)


class NpuFusedAdamW(torch.optim.Optimizer):
    """torch_npu's: gathers values and gradients at the first step, knows whole steps only, and cannot forget a
    gradient."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, defaults)
        self.is_states_combined = False
        self._gathered: list[list[tuple[Any, Any]]] = []  # by group: values with the gradients they had at first
        self._moments: list[list[Any]] = []

    def _gather(self) -> None:
        if self._gathered or not any(p.grad is not None for group in self.param_groups for p in group["params"]):
            return
        for group in self.param_groups:
            for value in group["params"]:
                if value.dtype not in (torch.float32, torch.float16):
                    raise TypeError(f"must be either float32 or float16, but received {value.dtype}")
                if not value.is_contiguous():
                    raise RuntimeError("Tensors to combine must be contiguous.")
            self._gathered.append([(p, p.grad) for p in group["params"] if p.grad is not None])

    def _check(self) -> None:
        for value, gradient in (pair for group in self._gathered for pair in group):
            if value.grad is not gradient:
                raise RuntimeError("a gradient left the memory it shares with the others")

    def get_combined_grads(self) -> list[Any]:
        """What stands for all float32 gradients in one tensor, and for all float16 ones."""
        self._gather()
        return [_Together([gradient for group in self._gathered for _, gradient in group]), None]

    @torch.no_grad()
    def clip_grad_norm_fused_(self, max_norm: float, norm_type: float = 2) -> Any:
        """The norm of all gradients together, which are scaled down to max_norm."""
        calls["clip"] += 1
        self._gather()
        self._check()
        gradients = [gradient for group in self._gathered for _, gradient in group]
        norm = torch.stack([gradient.float().pow(2).sum() for gradient in gradients]).sum().sqrt()
        factor = float(max_norm) / (norm + 1e-6)
        if factor < 1:
            for gradient in gradients:
                gradient.mul_(factor)
        return norm

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zeros, in place."""
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        self._gather()
        for _, gradient in (pair for group in self._gathered for pair in group):
            with torch.no_grad():
                gradient.zero_()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """AdamW, decay first."""
        calls["step"] += 1
        self._gather()
        self._check()
        if not self.is_states_combined:  # copies of what is in the state; what is put there later is not seen
            for group in self._gathered:
                for value, _ in group:
                    state = self.state[value]
                    state.setdefault("step", 0)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = state[name].clone() if name in state else torch.zeros_like(value)
            self._moments = [[dict(self.state[value]) for value, _ in group] for group in self._gathered]
            self.is_states_combined = True
        for group, pairs, moments in zip(self.param_groups, self._gathered, self._moments, strict=True):
            first, second = group["betas"]
            for (value, gradient), kept in zip(pairs, moments, strict=True):
                assert isinstance(kept["step"], int), "a whole number"
                kept["step"] += 1
                self.state[value]["step"] = kept["step"]
                value.mul_(1 - group["lr"] * group["weight_decay"])
                kept["exp_avg"].mul_(first).add_(gradient, alpha=1 - first)
                kept["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                root = (kept["exp_avg_sq"].sqrt() / (1 - second ** kept["step"]) ** 0.5).add_(group["eps"])
                value.addcdiv_(kept["exp_avg"], root, value=-group["lr"] / (1 - first ** kept["step"]))


class _Together:
    """Several tensors that are changed as one."""

    def __init__(self, tensors: list[Any]) -> None:
        self._tensors = tensors

    def mul_(self, factor: float) -> None:
        """In place."""
        for tensor in self._tensors:
            tensor.mul_(factor)


@contextmanager
def planted(*, optim: bool = True, attention: bool = True) -> Iterator[dict[str, int]]:
    """`import torch_npu` finds this stand-in meanwhile; gives the counts of calls, from zero."""
    module, inner = types.ModuleType("torch_npu"), types.ModuleType("torch_npu.optim")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None, is_package=True)
    module.__path__ = []
    if attention:
        module.npu_fusion_attention = npu_fusion_attention  # type: ignore[attr-defined]
    inner.NpuFusedAdamW = NpuFusedAdamW  # type: ignore[attr-defined]
    sys.modules["torch_npu"] = module
    if optim:
        sys.modules["torch_npu.optim"] = inner
    calls.update(dict.fromkeys(calls, 0))
    try:
        yield calls
    finally:
        sys.modules.pop("torch_npu", None)
        sys.modules.pop("torch_npu.optim", None)
