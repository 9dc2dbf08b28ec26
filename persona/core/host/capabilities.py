"""What a backend may or may not be able to do, by name: what `Backend.capabilities(device)` answers, what a plan needs,
and what `persona backends` prints. A name that a backend does not mention is not known, and is left to its session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from persona.core.host.errors import UsageError

if TYPE_CHECKING:
    from persona.core.training.base import Base
    from persona.core.training.plan import TrainingPlan

CAPABILITIES: dict[str, str] = {
    "fp32": "arithmetic in 32 bits",
    "bf16": "arithmetic in bfloat16",
    "fp16": "arithmetic in float16",
    "low_rank": "low-rank deltas beside frozen weights",
    "weights": "whole weights",
    "new_tokens": "new words",
    "text_encoder": "text encoders trained too",
    "conv_lora": "low-rank deltas on convolutions",
    "dora": "DoRA: magnitude and direction apart",
    "dropout": "dropout in front of low-rank deltas",
    "ema": "moving averages of what is trained",
    "gradient_checkpointing": "less memory, more time",
    "compile": "the denoiser compiled, for faster steps",
    "fused_adamw": "AdamW in one kernel",
    "flash_attention": "attention without its whole matrix",
    "devices": "several devices at once",
    "sharding": "a model in parts, told by accelerate's configuration file",
}
"""Every name with what it means; samplers are named "sampler:ddim" and so on besides."""

EVERYWHERE = dict.fromkeys(
    ("fp32", "low_rank", "weights", "new_tokens", "text_encoder", "dropout", "ema", "conv_lora"), True
)
"""What all of persona's own backends can do on every device; each adds what depends on the device."""

SWITCHES: dict[str, str] = {
    "lora": "low_rank",
    "decomposed": "dora",
    "conv_rank": "conv_lora",
    "dropout": "dropout",
    "train_text_encoder": "text_encoder",
    "ema_decay": "ema",
    "gradient_checkpointing": "gradient_checkpointing",
    "compile": "compile",
}
"""The capability that an option of a method, or a setting that all share, needs when it is switched on."""


def needs_of(plan: TrainingPlan, base: Base) -> dict[str, str]:
    """What a plan on `base` needs of the backend that executes it: capability -> what was typed to ask for it."""
    needs: dict[str, str] = {plan.precision: f"--precision {plan.precision}"}
    for part in plan.trains:
        if part.kind == "new-tokens":
            needs["new_tokens"] = f"--plugin {plan.method}"
            continue
        if part.component.startswith("text_encoder"):
            needs["text_encoder"] = "--train-text-encoder"
        if part.kind == "weights":
            needs["weights"] = f"--plugin {plan.method}"
            continue
        needs["low_rank"] = f"--plugin {plan.method}"
        if part.decomposed:
            needs["dora"] = "--dora"
        if part.dropout:
            needs["dropout"] = "--dropout"
        stored = base.parameters[part.component]
        if any(len(stored[f"{path}.weight"].shape) == 4 for path in part.targets if f"{path}.weight" in stored):
            needs["conv_lora"] = "--conv-rank, or a --target that is a convolution"
    if plan.ema_decay is not None:
        needs["ema"] = "--ema-decay"
    if plan.gradient_checkpointing:
        needs["gradient_checkpointing"] = "--gradient-checkpointing"
    if plan.compile:
        needs["compile"] = "--compile"
    return needs


def refuse(needs: Mapping[str, str], able: Mapping[str, bool], backend: str, device: str) -> None:
    """Raises UsageError, naming what was typed, for the first of `needs` that the backend says it has not."""
    for name, typed in needs.items():
        if not able.get(name, True):
            meant = CAPABILITIES.get(name, name)
            takes = [other for other, can in able.items() if can and other.partition(":")[0] == name.partition(":")[0]]
            instead = f", or take one of {', '.join(word.partition(':')[2] for word in takes)}" if ":" in name else ""
            raise UsageError(
                f"{typed}: the backend {backend} on {device} cannot do this ({meant}).",
                hint=f"Leave it out{instead}, or take another backend; what each can do: persona backends",
            )


def refuse_optimizer(plan: TrainingPlan, backend: str) -> None:
    """Raises UsageError for an optimizer that has no class for this backend."""
    known = plan.optimizer.classes
    if plan.optimizer.name != "adamw" and backend not in known:
        raise UsageError(
            f"--optimizer {plan.optimizer.name} is there for {' and '.join(sorted(known))}, not for {backend}.",
            hint="The built-in one is the same on every backend: --optimizer adamw",
        )
