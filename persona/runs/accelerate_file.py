"""The file that `accelerate config` writes, as a run follows it: how many processes there are, and whether the model is
spread over them (FSDP) or each has a copy. Read without accelerate, so that what cannot be followed is refused at once;
the tests compare with accelerate's own reading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona.core.host.contracts import Sharding
from persona.core.host.errors import UsageError, did_you_mean
from persona.core.training.plan import TrainingPlan

COPIES = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU")
"""Values of distributed_type with which every process has a whole copy."""
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""FSDP 1's sharding strategies in accelerate's order, from 1; the hybrid ones are the plain ones on one machine."""
SILENT = ("machine_rank", "main_training_function", "rdzv_backend", "same_network", "debug", "gpu_ids", "tpu_env")
IGNORED = ("enable_cpu_affinity", "main_process_ip", "main_process_port", "dynamo_config", "mpirun_config")
REFUSED = (
    *("parallelism_config", "megatron_lm_config", "fp8_config", "downcast_bf16"),
    *("tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "command_file", "commands"),
)
FOLLOWED = (
    *("compute_environment", "distributed_type", "num_processes", "num_machines", "mixed_precision", "use_cpu"),
    *("fsdp_config", "deepspeed_config", "dynamo_backend", "fp16"),
)
FSDP_FOLLOWED = (
    *("fsdp_version", "fsdp_reshard_after_forward", "fsdp_sharding_strategy", "fsdp_offload_params"),
    "fsdp_activation_checkpointing",
)
FSDP_IGNORED = (
    *("fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap", "fsdp_min_num_params", "fsdp_ignored_modules"),
    *("fsdp_backward_prefetch", "fsdp_forward_prefetch", "fsdp_state_dict_type", "fsdp_use_orig_params"),
    *("fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states", "fsdp_limit_all_gathers"),
)
DEEPSPEED_FOLLOWED = ("zero_stage", "offload_optimizer_device", "offload_param_device")
DEEPSPEED_IGNORED = (
    *("gradient_accumulation_steps", "gradient_clipping", "zero3_init_flag", "zero3_save_16bit_model"),
    "deepspeed_moe_layer_cls_names",
)
DEEPSPEED_REFUSED = {
    "deepspeed_config_file": "Write its zero_stage into the file itself: deepspeed_config: {zero_stage: 2}",
    **dict.fromkeys(
        ("deepspeed_hostfile", "deepspeed_multinode_launcher", "deepspeed_inclusion_filter",
         "deepspeed_exclusion_filter"), "A run is on one machine: take it out"),
    **dict.fromkeys(("offload_optimizer_nvme_path", "offload_param_nvme_path"), "offload_param_device: cpu, or none"),
}  # fmt: skip
"""Keys of deepspeed_config, with what to type instead."""
FSDP_REFUSED = {
    key: f"Take it out: {key}" for key in ("fsdp_activation_checkpointing_offload", "fsdp_mixed_precision_policy")
}


@dataclass(frozen=True)
class Told:
    """What such a file says. `precision` and `gradient_checkpointing` are None where it says nothing."""

    path: str
    devices: int
    sharding: Sharding | None = None
    precision: str | None = None
    gradient_checkpointing: bool | None = None
    on_cpu: bool = False
    notes: tuple[str, ...] = ()

    def device(self, asked: str) -> str:
        """The device of a run for which `asked` was typed. Raises UsageError when the two differ."""
        if self.on_cpu and asked not in ("auto", "cpu"):
            raise UsageError(f"{self.path} is for the cpu, and --device {asked} is not.", hint="--device cpu")
        return "cpu" if self.on_cpu else asked

    def refuse_other(self, precision: str, gradient_checkpointing: bool) -> None:
        """Raises UsageError for what the file says otherwise than the run's own flags."""
        if self.precision not in (None, precision):
            raise UsageError(
                f"{self.path}: mixed_precision is {self.precision.replace('fp32', 'no')}, and --precision {precision}.",
                hint=f"Say the same in both: --precision {self.precision}",
            )
        if self.gradient_checkpointing and not gradient_checkpointing:
            raise UsageError(
                f"{self.path}: fsdp_activation_checkpointing is on, and --gradient-checkpointing is not.",
                hint="--gradient-checkpointing",
            )


@dataclass
class _Reading:
    """The file while it is read; every error names it."""

    path: Path
    values: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    def refuse(self, what: str, hint: str = "") -> UsageError:
        return UsageError(f"{self.path}: {what}.", hint=hint)

    def whole_number(self, key: str, default: int | None) -> int:
        value: Any = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not str(value).isdigit() or int(value) < 1:
            raise self.refuse(f"{key} is {value}, which is not a whole number from 1 on", f"For example: {key}: 2")
        return int(value)

    def section(self, name: str, known: Iterable[str], refused: Mapping[str, str], example: str) -> Mapping[str, Any]:
        """The lines below `name`, of which each is `known`; `refused` keys, with what to type instead, say nothing."""
        told: Any = self.values.get(name) or {}
        if not isinstance(told, dict):
            raise self.refuse(f"{name} is not a list of 'key: value' lines", f"{name}: {{{example}}}")
        names = (*known, *refused)
        for key, value in told.items():
            if key not in names:
                raise self.refuse(f"{name}: unknown key {key}", did_you_mean(str(key), names))
            if key in refused and value not in (None, "", False, "false", "no", "none"):
                raise self.refuse(f"{name}: {key} is not supported", refused[key])
        return told

    def switch(self, key: str, value: Any, default: bool = False) -> bool:
        if value is None:
            return default
        word = str(value).lower()
        if word not in ("true", "false", "yes", "no", "1", "0", "on", "off"):
            raise self.refuse(f"{key} is {value}, which is neither true nor false", f"For example: {key}: true")
        return word in ("true", "yes", "1", "on")


def read_accelerate(path: Path) -> Told:
    """What the file at `path` says. Raises UsageError, naming the key, for what a run of persona cannot follow."""
    from persona.runs.recipe import read_recipe

    if not path.is_file():
        raise UsageError(
            f"There is no configuration of accelerate {path}.",
            hint=f"Make one: accelerate config --config_file {path}, or leave it out: --accelerate-config none",
        )
    found = _Reading(path, {key: value for key, (value, _) in read_recipe(path).items()})
    _refuse_keys(found)
    named = found.values.get("distributed_type")
    kind = "NO" if named is False else str(named or "").upper()  # YAML reads NO without quotes as false
    if kind not in (*COPIES, "FSDP", "DEEPSPEED"):
        raise found.refuse(
            f"distributed_type {kind or 'is missing'}: persona knows {', '.join(COPIES)}, FSDP and DEEPSPEED",
            did_you_mean(kind, (*COPIES, "FSDP", "DEEPSPEED")) if kind else "distributed_type: FSDP",
        )
    count = found.whole_number("num_processes", 1 if kind == "NO" else None)
    if kind == "NO" and count > 1:
        raise found.refuse(f"distributed_type is NO, and num_processes {count}", "distributed_type: MULTI_GPU, or FSDP")
    sharding, checkpointing = _fsdp(found) if kind == "FSDP" else (None, None)
    if kind == "DEEPSPEED":
        sharding = _zero(found)
    if sharding is not None and count == 1:
        found.notes.append(f"{path}: with one process there is nobody to spread the model over; it is whole")
        sharding = None
    on_cpu = kind == "MULTI_CPU" or found.switch("use_cpu", found.values.get("use_cpu"))
    return Told(str(path), count, sharding, _precision(found), checkpointing, on_cpu, tuple(found.notes))


def refuse_unshardable(plan: TrainingPlan) -> None:
    """Raises UsageError, naming the flag, for what cannot be done with a model that is spread over processes."""
    if plan.optimizer.name != "adamw":
        raise UsageError(
            f"--optimizer {plan.optimizer.name} looks at whole weights, and with FSDP a process has a part of each.",
            hint="--optimizer adamw, or distributed_type: MULTI_GPU in the configuration of accelerate",
        )
    if plan.compile:
        raise UsageError(
            "--compile: a denoiser that is compiled whole has to be whole, and with FSDP a process has a part of it.",
            hint="Leave --compile out, or distributed_type: MULTI_GPU in the configuration of accelerate",
        )


def in_words(sharding: Sharding, count: int) -> str:
    """What is told before the start."""
    kept = "given back after each use" if sharding.reshard_after_forward else "kept from forward to backward"
    where = ", its parts in main memory" if sharding.offload else ""
    return (
        f"FSDP: the denoiser and what is trained are spread over {count} processes{where}; gathered weights are {kept}"
    )


def _refuse_keys(found: _Reading) -> None:
    known = (*FOLLOWED, *SILENT, *IGNORED, *REFUSED)
    for key, value in found.values.items():
        if key not in known:
            raise found.refuse(f"unknown key {key}", did_you_mean(key, known))
        if key in REFUSED and value not in (None, "", False, "no", "false") and value != {} and value != []:
            raise found.refuse(f"{key} is not supported", f"Take it out: {key}")
        if key in IGNORED and value not in (None, "", False, "no", "false") and value != {}:
            found.notes.append(f"{found.path}: {key} is ignored")
    place = str(found.values.get("compute_environment", "LOCAL_MACHINE"))
    if place != "LOCAL_MACHINE":
        raise found.refuse(f"compute_environment {place} is not supported", "compute_environment: LOCAL_MACHINE")
    if found.whole_number("num_machines", 1) > 1:
        raise found.refuse(
            f"num_machines is {found.values['num_machines']}; a run is on one machine", "num_machines: 1"
        )
    gpus = found.values.get("gpu_ids")
    if gpus is not None and str(gpus) != "all":
        listed = str(gpus).replace(" ", "").split(",")
        if listed != [str(number) for number in range(len(listed))]:
            raise found.refuse(
                f"gpu_ids is {gpus}; persona takes the first GPUs it sees",
                f"gpu_ids: all, and export CUDA_VISIBLE_DEVICES={','.join(listed)}",
            )


def _precision(found: _Reading) -> str | None:
    value = found.values.get("mixed_precision")
    if value is None:
        return "fp16" if found.switch("fp16", found.values.get("fp16")) else None
    word = str(value).lower()
    word = "fp32" if word in ("no", "false") else word
    if word not in ("fp32", "fp16", "bf16"):
        raise found.refuse(f"mixed_precision {value} is not supported", "mixed_precision: bf16, fp16 or 'no'")
    return word


def _fsdp(found: _Reading) -> tuple[Sharding | None, bool | None]:
    """How the model is spread, None for copies; and whether activations are to be computed again."""
    told = found.section("fsdp_config", (*FSDP_FOLLOWED, *FSDP_IGNORED), FSDP_REFUSED, "fsdp_version: 2")
    version = str(told.get("fsdp_version", 1))
    if version not in ("1", "2"):
        raise found.refuse(f"fsdp_config: fsdp_version {version} is not known", "fsdp_version: 2")
    if version == "1":
        found.notes.append(f"{found.path}: what fsdp_version 1 says is done by FSDP 2")
    ignored = [key for key in told if key in FSDP_IGNORED]
    if ignored:
        found.notes.append(f"{found.path}: persona has its own way, and ignores {', '.join(ignored)}")
    checkpointing = told.get("fsdp_activation_checkpointing")
    again = None if checkpointing is None else found.switch("fsdp_activation_checkpointing", checkpointing)
    offload = found.switch("fsdp_offload_params", told.get("fsdp_offload_params"))
    reshards = _reshards(found, told.get("fsdp_reshard_after_forward", told.get("fsdp_sharding_strategy")))
    return (None if reshards is None else Sharding(reshards, offload)), again


def _reshards(found: _Reading, value: Any) -> bool | None:
    """Whether gathered weights are given back after a forward; None when every process keeps a whole copy."""
    word = str(True if value is None else value).upper()
    if word.isdigit() and 1 <= int(word) <= len(STRATEGIES):
        word = STRATEGIES[int(word) - 1]
    if word == "NO_SHARD":
        return None
    if word in ("TRUE", "YES", "FULL_SHARD", "HYBRID_SHARD"):
        return True
    if word in ("FALSE", "NO", "SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2"):
        return False
    raise found.refuse(
        f"fsdp_config: fsdp_reshard_after_forward {value} is not known",
        f"fsdp_reshard_after_forward: true or false, or with fsdp_version 1 one of {', '.join(STRATEGIES)}",
    )


def _zero(found: _Reading) -> Sharding | None:
    """How FSDP spreads what DeepSpeed's ZeRO stage would (arXiv 1910.02054): 3 everything, 1 and 2 all but the weights
    from a forward to its backward; None for stage 0, copies."""
    known = (*DEEPSPEED_FOLLOWED, *DEEPSPEED_IGNORED)
    told = found.section("deepspeed_config", known, DEEPSPEED_REFUSED, "zero_stage: 2")
    stage, places = str(told.get("zero_stage", 2)), set()
    if stage not in ("0", "1", "2", "3"):
        raise found.refuse(f"deepspeed_config: zero_stage {stage} is not known", "zero_stage: 0, 1, 2 or 3")
    for key in ("offload_optimizer_device", "offload_param_device"):
        place = str(told.get(key, "none")).lower()
        if place not in ("none", "cpu"):
            raise found.refuse(f"deepspeed_config: {key} {place} is not supported", f"{key}: cpu, or none")
        places.add(place)
    ignored = [key for key in told if key in DEEPSPEED_IGNORED]
    if ignored:
        found.notes.append(f"{found.path}: persona has its own flags for this, and ignores {', '.join(ignored)}")
    if stage == "0":
        return None
    found.notes.append(f"{found.path}: what ZeRO stage {stage} spreads is spread by torch's FSDP 2, without deepspeed")
    if "cpu" in places:
        found.notes.append(f"{found.path}: parts, gradients and the optimizer's state are offloaded together")
    return Sharding(stage == "3", "cpu" in places)
