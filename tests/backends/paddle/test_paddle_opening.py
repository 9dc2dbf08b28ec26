"""Opening bases, devices and words on Paddle."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ppdiffusers", reason="the Paddle environment is not here: persona backends setup paddle")

from persona.core.adapters.entry import Adapter, Embedding
from persona.core.adapters.tensor import in_memory
from persona.core.host.contracts import SampleRequest
from persona.core.host.errors import BackendMissing, BaseModelError, ConversionError, UsageError
from persona.formats.containers.safetensors import Safetensors
from persona.plugins.backends.paddle import PaddleBackend
from tests.backends.golden import cases as golden
from tests.narrow_models import narrow_base


def test_looking_whether_the_backend_is_there_imports_no_framework() -> None:
    code = (
        "import sys; from persona.plugins.backends.paddle import PaddleBackend; "
        "found = PaddleBackend().availability(); assert found.available and found.version, found; "
        "print([name for name in ('paddle', 'ppdiffusers', 'paddlenlp', 'torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def copied(tiny: Any, tmp_path: Path) -> Any:
    """A copy of the tiny base to spoil, and a way to rewrite a weights file of it."""
    shutil.copytree(tiny().path, tmp_path / "base")

    def rewrite(component: str, change: Any) -> Any:
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        path = tmp_path / "base" / component / f"{stem}.safetensors"
        tensors = {name: in_memory(np.array(ref.read())) for name, ref in Safetensors().read(path).tensors.items()}
        Safetensors().write(path, change(tensors), {"format": "pt"})
        return narrow_base("sd1", tmp_path / "base")

    return rewrite


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_missing_unknown_and_odd_weights_are_refused(component: str, copied: Any, opened: Any) -> None:
    key = {"unet": "conv_in.weight", "vae": "decoder.conv_in.weight",
           "text_encoder": "text_model.final_layer_norm.weight"}[component]  # fmt: skip
    with pytest.raises(BaseModelError, match=f"{component} has no {key}"):
        opened(copied(component, lambda all_: {name: value for name, value in all_.items() if name != key}))
    with pytest.raises(BaseModelError, match=r"weights nobody knows: strange\.weight"):
        whole = {key: in_memory(np.ones(_shape(component), np.float32)), "strange.weight": in_memory(np.ones(3))}
        opened(copied(component, lambda all_: all_ | whole))
    with pytest.raises(BaseModelError, match=rf"{key} is \[7\]"):
        opened(copied(component, lambda all_: {k: v for k, v in all_.items() if k != "strange.weight"}
                      | {key: in_memory(np.ones(7, np.float32))}))  # fmt: skip


def _shape(component: str) -> tuple[int, ...]:
    return {"unet": (16, 4, 3, 3), "vae": (8, 4, 3, 3), "text_encoder": (32,)}[component]


def test_a_text_encoder_saved_without_its_prefix_is_read(tiny: Any, copied: Any, opened: Any) -> None:
    flat = copied("text_encoder", lambda all_: {name.removeprefix("text_model."): ref for name, ref in all_.items()})
    ours, theirs = (opened(base).encode_text(golden.PROMPTS)["hidden_states"] for base in (flat, tiny()))
    np.testing.assert_array_equal(ours, theirs)


def test_a_component_of_another_class_is_refused(tiny: Any, opened: Any) -> None:
    base = tiny()
    components = {**base.components, "unet": {**base.components["unet"], "_class_name": "UNet9D"}}
    with pytest.raises(BaseModelError, match="its unet is a UNet9D"):
        opened(dataclasses.replace(base, components=components))


def test_devices_that_are_not_there() -> None:
    backend = PaddleBackend()
    assert backend.capabilities("cpu")["fp32"] and not backend.capabilities("cpu")["bf16"]
    assert backend.free_memory("cpu") > 0
    with pytest.raises(BackendMissing, match="only cpu"):
        backend.capabilities("cuda:7")
    with pytest.raises(UsageError, match='no device called "gpu"') as unknown:
        backend.capabilities("gpu")
    assert "cuda" in unknown.value.hint
    with pytest.raises(UsageError, match="does not run on npu"):
        backend.capabilities("npu")


def test_a_word_from_a_file_is_read_as_its_vectors(tiny: Any, opened: Any) -> None:
    session = opened(tiny())
    known = session.encode_text(["a photo of red cat", "a photo of flowers"])["hidden_states"]
    table = session._components["text_encoder"].text_model.token_embedding.weight.numpy()
    rows = table[session._words["text_encoder"].split("red cat")]
    told = session.load_adapters([(Adapter("sd1", {}, [Embedding("<toy>", {"text_encoder": in_memory(rows)})]), 1.0)])
    assert told == ["<toy> is a word of 2 vectors."]
    again = session.encode_text(["a photo of <toy>", "a photo of flowers"])["hidden_states"]
    np.testing.assert_array_equal(again, known)
    wide = Embedding("<wide>", {"text_encoder": in_memory(np.zeros((1, 99), np.float32))})
    with pytest.raises(ConversionError, match="99 wide"):
        session.load_adapters([(Adapter("sd1", {}, [wide]), 1.0)])


def test_long_prompts_are_cut_and_that_is_said(tiny: Any, opened: Any) -> None:
    session = opened(tiny())
    session.encode_text(["dog " * 100, "dog " * 100])
    assert len(session.notes) == 1 and "75 tokens" in session.notes[0]


def test_a_picture_does_not_depend_on_its_batch(tiny: Any, opened: Any) -> None:
    session = opened(tiny())
    prompts = ("a cat", "a dog", "a toy")
    together = session.sample(SampleRequest(prompts, (1, 2, 3), sampler="euler-a", steps=3, batch=3))
    alone = session.sample(SampleRequest(prompts[2:], (3,), sampler="euler-a", steps=3))
    assert together.shape == (3, 64, 64, 3)
    assert np.abs(alone.astype(int) - together[2:].astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - together[1].astype(int)).max() > 5
