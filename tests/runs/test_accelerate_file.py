"""What `accelerate config` writes is read as accelerate reads it; what cannot be followed is refused with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from persona.core.host.contracts import Sharding
from persona.core.host.errors import UsageError
from persona.runs.accelerate_file import STRATEGIES, Told, read_accelerate

COMMON = ("train", "--plugin", "lora", "--prompt", "a toy", "--device", "cpu", "--steps", 1)
ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {{{}}}\n"
SPREAD = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n"


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def of(text: str, name: str = "accelerate.yaml") -> Told:
        (tmp_path / name).write_text(text)
        return read_accelerate(tmp_path / name)

    return of


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_a_file_that_accelerate_writes(name: str, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    spread = {
        "fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_offload_params": True,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True, "fsdp_activation_checkpointing": False,
    }  # fmt: skip
    made = ClusterConfig(
        compute_environment="LOCAL_MACHINE", distributed_type="FSDP", mixed_precision="bf16", use_cpu=False,
        debug=False, num_processes=4, fsdp_config=spread, gpu_ids="all", downcast_bf16="no",
    )  # fmt: skip
    file = tmp_path / name
    made.to_json_file(file) if name.endswith("json") else made.to_yaml_file(file)
    theirs, told = load_config_from_file(str(file)), read_accelerate(file)
    assert (told.devices, told.precision) == (theirs.num_processes, theirs.mixed_precision) == (4, "bf16")
    assert told.sharding == Sharding(
        theirs.fsdp_config["fsdp_reshard_after_forward"], theirs.fsdp_config["fsdp_offload_params"]
    )
    assert told.gradient_checkpointing is False and not told.on_cpu
    (note,) = told.notes
    assert note.endswith("fsdp_auto_wrap_policy, fsdp_cpu_ram_efficient_loading, fsdp_state_dict_type")


@pytest.mark.parametrize("key", ["fsdp_sharding_strategy", "fsdp_reshard_after_forward"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_mean_what_accelerate_turns_them_into(strategy: str, key: str, read: Any) -> None:
    from accelerate.commands.to_fsdp2 import convert_config_to_fsdp2

    theirs = convert_config_to_fsdp2({"fsdp_config": {key: strategy}})["fsdp_config"]["fsdp_reshard_after_forward"]
    told = read(f"distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {{{key}: {strategy}}}\n")
    if strategy == "NO_SHARD":
        assert told.sharding is None
    else:
        assert told.sharding == Sharding(theirs)


def test_older_files_number_them_as_accelerate_does(read: Any) -> None:
    from accelerate.utils.constants import FSDP_SHARDING_STRATEGY

    assert list(STRATEGIES) == FSDP_SHARDING_STRATEGY
    text = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config:\n  fsdp_sharding_strategy: 2\n"
    assert read(text).sharding == Sharding(reshard_after_forward=False)


@pytest.mark.parametrize(
    ("told", "sharding"),
    [
        ("zero_stage: 3", Sharding(reshard_after_forward=True)),
        ("zero_stage: 2, offload_optimizer_device: none, offload_param_device: none", Sharding(False)),
        ("zero_stage: 1", Sharding(reshard_after_forward=False)),
        ("zero_stage: 3, offload_param_device: cpu", Sharding(True, offload=True)),
        ("zero_stage: 2, offload_optimizer_device: cpu", Sharding(False, offload=True)),
        ("zero_stage: 0", None),
    ],
)
def test_deepspeeds_stages_are_spread_by_fsdp(told: str, sharding: Sharding | None, read: Any) -> None:
    found = read(ZERO.format(f"gradient_accumulation_steps: 1, {told}"))
    assert (found.devices, found.sharding) == (2, sharding)
    assert any("ignores gradient_accumulation_steps" in note for note in found.notes)
    assert any("without deepspeed" in note for note in found.notes) is (sharding is not None)


@pytest.mark.parametrize(
    ("text", "devices", "on_cpu"),
    [
        ("distributed_type: 'NO'\n", 1, False),
        ("distributed_type: NO\nnum_processes: 1\nuse_cpu: true\n", 1, True),
        ("distributed_type: MULTI_GPU\nnum_processes: 3\ngpu_ids: 0,1,2\n", 3, False),
        ("distributed_type: MULTI_CPU\nnum_processes: 2\n", 2, True),
        (SPREAD.replace("2\nfsdp", "1\nfsdp"), 1, False),
    ],
)
def test_files_that_keep_the_model_whole(text: str, devices: int, on_cpu: bool, read: Any) -> None:
    told = read(text)
    assert (told.devices, told.on_cpu, told.sharding) == (devices, on_cpu, None)


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("", "distributed_type is missing", "distributed_type: FSDP"),
        ("- a\n", "list of 'key: value' lines", ""),
        ("num_processes: [\n", "not valid YAML", ""),
        ("distributed_type: SHARDED\nnum_processes: 2", "distributed_type SHARDED", "FSDP"),
        ("distributed_type: XLA\nnum_processes: 2", "distributed_type XLA", "FSDP"),
        ("distributed_type: MEGATRON_LM\nnum_processes: 2", "distributed_type MEGATRON_LM", "FSDP"),
        ("distributed_type: FSDP\n", "num_processes is None", "num_processes: 2"),
        ("distributed_type: FSDP\nnum_processes: two", "num_processes is two", "num_processes: 2"),
        ("distributed_type: NO\nnum_processes: 2", "num_processes 2", "MULTI_GPU"),
        (SPREAD + "num_machines: 2", "num_machines is 2", "num_machines: 1"),
        (SPREAD + "num_procesess: 2", "unknown key num_procesess", "num_processes"),
        (SPREAD + "mixed_precision: fp8", "mixed_precision fp8", "bf16"),
        (SPREAD + "downcast_bf16: true", "downcast_bf16 is not supported", "Take it out"),
        (SPREAD + "tpu_use_cluster: true", "tpu_use_cluster is not supported", "Take it out"),
        (SPREAD + "compute_environment: AMAZON_SAGEMAKER", "AMAZON_SAGEMAKER", "LOCAL_MACHINE"),
        (SPREAD + "parallelism_config: {parallelism_config_tp_size: 2}", "parallelism_config", "Take it out"),
        (SPREAD + "gpu_ids: 2,3", "gpu_ids is 2,3", "CUDA_VISIBLE_DEVICES=2,3"),
        (SPREAD + "use_cpu: perhaps", "use_cpu is perhaps", "use_cpu: true"),
        (SPREAD.replace("version: 2", "version: 3"), "fsdp_version 3", "fsdp_version: 2"),
        (SPREAD.replace("version: 2", "versoin: 2"), "unknown key fsdp_versoin", "fsdp_version"),
        (SPREAD.replace("version: 2", "reshard_after_forward: half"), "fsdp_reshard_after_forward half", "true or"),
        (SPREAD.replace("{fsdp_version: 2}", "yes"), "fsdp_config is not a list", "fsdp_version"),
        (ZERO.format("zero_stage: 4"), "zero_stage 4", "0, 1, 2 or 3"),
        (ZERO.format("zero_stag: 2"), "unknown key zero_stag", "zero_stage"),
        (ZERO.format("offload_param_device: nvme"), "offload_param_device nvme", "cpu, or none"),
        (ZERO.format("deepspeed_config_file: ds.json"), "deepspeed_config_file is not supported", "zero_stage: 2"),
        (ZERO.format("deepspeed_hostfile: hosts"), "deepspeed_hostfile is not supported", "one machine"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_with_its_key(text: str, says: str, hint: str, read: Any) -> None:
    with pytest.raises(UsageError) as told:
        read(text)
    assert says in told.value.message and "accelerate.yaml" in told.value.message
    assert hint in told.value.hint


@pytest.mark.parametrize(
    ("words", "more", "error", "hint"),
    [
        (("--devices", 3), "", "--devices 3, and", "--accelerate-config none"),
        (("--precision", "fp16"), "mixed_precision: bf16", "mixed_precision is bf16, and --precision fp16", "bf16"),
        ((), "mixed_precision: bf16", "mixed_precision is bf16, and --precision fp32", "--precision bf16"),
        (("--precision", "bf16"), "mixed_precision: 'no'", "mixed_precision is no, and", "--precision fp32"),
        (("--device", "cuda"), "use_cpu: true", "--device cuda is not", "--device cpu"),
        (("--optimizer", "lion"), "", "--optimizer lion", "--optimizer adamw"),
        (("--compile",), "", "--compile", "MULTI_GPU"),
        (("--batch", 3), "", "3 samples a step, which 2 devices", "--batch 4"),
    ],
)
def test_what_does_not_go_with_the_file_is_refused(
    words: Any, more: str, error: str, hint: str, persona_: Any, toys: Path, tiny_sd1: Path, tmp_path: Path
) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(SPREAD + more)
    common = (*COMMON, "--data", toys, "--base", tiny_sd1, "--output", tmp_path / "run", "--batch", 2)
    answer = persona_(*common, "--accelerate-config", file, *words)
    assert answer.code == 2 and error in answer.err and hint in answer.err
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there(persona_: Any, toys: Path, tiny_sd1: Path) -> None:
    answer = persona_(*COMMON, "--data", toys, "--base", tiny_sd1, "--accelerate-config", "no.yaml")
    assert answer.code == 2 and "There is no configuration of accelerate" in answer.err
    assert "accelerate config --config_file" in answer.err


def test_another_backend_cannot_follow_it(toys: Path) -> None:
    from types import SimpleNamespace

    from persona.runs.launching import devices_of

    paddle: Any = SimpleNamespace(name="paddle", capabilities=lambda device: {"devices": True, "sharding": False})
    recipe: Any = SimpleNamespace(device="cpu", devices=2, accelerate_config="a.yaml", sharding=None)
    with pytest.raises(UsageError, match="the backend paddle on cpu cannot follow a file of accelerate") as told:
        devices_of(paddle, recipe, None)  # type: ignore[arg-type]
    assert told.value.hint == "--devices 2, or --backend torch on cpu or cuda"


def test_a_dry_run_says_how_the_model_is_spread(persona_: Any, toys: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SPREAD)
    common = (*COMMON, "--data", toys, "--base", tiny_sd1, "--batch", 2, "--dry-run")
    answer = persona_(*common, "--accelerate-config", tmp_path / "a.yaml")
    assert answer.code == 0 and "2 (cpu), 1 samples of a step on each" in answer.out
    assert "spread over 2 processes" in answer.out and "not tried: a trial is of one process" in answer.out


def test_a_recipe_names_it_beside_itself(persona_: Any, toys: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SPREAD)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: lora\nprompt: a toy\ndata: {toys}\nbase: {tiny_sd1}\naccelerate_config: a.yaml\nbatch: 2\n"
    )
    answer = persona_("train", recipe, "--device", "cpu", "--dry-run")
    assert answer.code == 0 and "spread over 2 processes" in answer.out
    answer = persona_("train", recipe, "--device", "cpu", "--dry-run", "--accelerate-config", "none")
    assert answer.code == 0 and "spread over" not in answer.out
