"""kohya's header and names: what A1111 and sd-scripts look at (dialects.md §7.1, §3.4)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from persona.core.adapters.entry import Adapter
from persona.core.adapters.tensor import in_memory
from persona.core.host.contracts import State, Told
from persona.core.host.errors import ConversionError, NoPlace
from persona.formats.dialects.kohya import DIALECT
from persona.formats.dialects.recognise import DIALECTS
from tests.formats.dialects.synthetic import family_adapter
from tests.formats.dialects.written import adapter_of, lora_entry

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def header(adapter: Adapter) -> dict[str, str]:
    return dict(DIALECT.write(adapter)[0].metadata)


@pytest.mark.parametrize(
    "family, v2, version",
    [("sd1", "False", "sd_v1"), ("sd2", "True", "sd_v2"), ("sdxl", "False", "sdxl_base_v1-0")],
)
def test_the_web_ui_sees_which_base_it_is_for(family: str, v2: str, version: str) -> None:
    """Without these keys A1111 hides the file."""
    made = header(family_adapter(family, components=["unet"], every=50))
    assert (made["ss_v2"], made["ss_base_model_version"]) == (v2, version)
    assert (made["ss_network_module"], made["ss_network_dim"], made["ss_network_alpha"]) == ("networks.lora", "2", "1")


def test_where_sdxl_and_kolors_are_left_the_commoner_is_named() -> None:
    adapter = replace(family_adapter("sdxl", components=["unet"], every=50), family=None)
    made = header(replace(adapter, families=frozenset({"kolors", "sdxl"})))
    assert made["ss_base_model_version"] == "sdxl_base_v1-0"


def test_several_ranks_are_called_dynamic_and_false_keys_are_rewritten() -> None:
    adapter = adapter_of(
        [lora_entry("unet", QUERY, 8, 8, rank=2), lora_entry("unet", QUERY.replace("to_q", "to_k"), 8, 8, rank=4)]
    )
    adapter.metadata = {
        "ss_network_dim": "32",
        "ss_network_alpha": "16",
        "sshs_model_hash": "abc",
        "ss_output_name": "cat",
    }
    made = header(adapter)
    assert (made["ss_network_dim"], made["ss_output_name"]) == ("Dynamic", "cat")
    assert "sshs_model_hash" not in made


def test_captions_and_folders_of_the_trainer_stay_behind() -> None:
    adapter = adapter_of([lora_entry("unet", QUERY, 8, 8)])
    adapter.metadata = {"ss_dataset_dirs": '{"/home/me/pictures": 1}', "ss_tag_frequency": "{}"}
    assert not set(adapter.metadata) & set(header(adapter))


def test_alpha_is_a_scalar_of_the_factors_dtype_unless_that_would_round_it() -> None:
    for alpha, dtype in ((1.0, "float16"), (1 / 3, "float32")):
        entry = lora_entry("unet", QUERY, 8, 8, rank=1, alpha=alpha, dtype="float16")
        made = DIALECT.write(adapter_of([entry]))[0].tensors
        (key,) = [key for key in made if key.endswith(".alpha")]
        assert (made[key].shape, made[key].dtype) == ((), np.dtype(dtype))


def test_a_family_that_decides_the_spelling_is_asked_for() -> None:
    adapter = replace(adapter_of([lora_entry("unet", QUERY, 8, 8)], None), families=frozenset({"sd1", "sdxl"}))
    with pytest.raises(ConversionError, match="differently") as problem:
        DIALECT.write(adapter)
    assert "--family" in problem.value.hint


@pytest.mark.parametrize("name", ["oft_unet_", "oft_te_", "lora_unet_"])
def test_oft_keeps_the_prefix_that_tells_whose_it_is(name: str) -> None:
    """sd-scripts' networks/oft.py writes `oft_unet_`, LyCORIS `lora_unet_`; the factors are called the same."""
    module = "text_model_encoder_layers_0_self_attn_q_proj" if "te" in name else QUERY.replace(".", "_")
    factors = {"oft_blocks": np.ones((2, 4, 4), np.float32), "alpha": np.float32(0.5)}
    tensors = {f"{name}{module}.{factor}": in_memory(value) for factor, value in factors.items()}
    adapter = DIALECT.read(State(tensors), Told(family="sd1"))
    assert {entry.algorithm for entry in adapter.entries.values()} == {"oft"}
    (output,) = DIALECT.write(adapter)
    assert {key: ref.read().tobytes() for key, ref in output.tensors.items()} == {
        key: ref.read().tobytes() for key, ref in tensors.items()
    }
    if name == "oft_unet_":
        with pytest.raises(NoPlace, match="prefix alone"):
            DIALECTS["comfy"].write(adapter)
