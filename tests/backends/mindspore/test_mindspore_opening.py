"""Opening bases, devices and words on MindSpore."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindone", reason="the MindSpore environment is not here: persona backends setup mindspore")

from persona.core.adapters.entry import Adapter, Embedding
from persona.core.adapters.tensor import in_memory
from persona.core.host.contracts import SampleRequest
from persona.core.host.errors import BackendMissing, BaseModelError, ConversionError, UsageError
from persona.formats.containers.safetensors import Safetensors
from persona.plugins.backends.mindspore import MindSporeBackend
from tests.backends.golden import cases as golden
from tests.narrow_models import narrow_base


def test_looking_whether_the_backend_is_there_imports_no_framework() -> None:
    code = (
        "import sys; from persona.plugins.backends.mindspore import MindSporeBackend; "
        "found = MindSporeBackend().availability(); assert found.available and found.version, found; "
        "print([name for name in ('mindspore', 'mindone', 'transformers', 'torch', 'numpy') if name in sys.modules])"
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
def test_missing_and_unknown_weights_are_refused(component: str, copied: Any, opened: Any) -> None:
    key = {"unet": "conv_in.weight", "vae": "decoder.conv_in.weight",
           "text_encoder": "text_model.final_layer_norm.weight"}[component]  # fmt: skip
    with pytest.raises(BaseModelError, match=f"{component} has no {key}"):
        opened(copied(component, lambda all_: {name: value for name, value in all_.items() if name != key}))
    spoilt = {"strange.weight": in_memory(np.ones(3, np.float32)), key: in_memory(_whole(component))}
    with pytest.raises(BaseModelError, match=r"weights nobody knows: strange\.weight"):
        opened(copied(component, lambda all_: all_ | spoilt))


def _whole(component: str) -> np.ndarray:
    shape = {"unet": (16, 4, 3, 3), "vae": (8, 4, 3, 3), "text_encoder": (32,)}[component]
    return np.ones(shape, np.float32)


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
    backend = MindSporeBackend()
    able = backend.capabilities("cpu")
    assert able["fp32"] and able["sampler:ddim"] and not able["bf16"]
    assert backend.free_memory("cpu") > 0
    for name in ("npu:7", "ascend"):
        with pytest.raises(BackendMissing, match="only cpu"):
            backend.capabilities(name)
    with pytest.raises(BackendMissing, match="not on cuda"):
        backend.capabilities("cuda")
    with pytest.raises(UsageError, match='no device called "cpx"') as unknown:
        backend.capabilities("cpx")
    assert "cpu" in unknown.value.hint


def test_what_cannot_be_computed_here_is_refused(tiny: Any, opened: Any) -> None:
    with pytest.raises(UsageError, match="cannot compute in bf16"):
        opened(tiny(), precision="bf16")
    session = opened(tiny())
    with pytest.raises(UsageError, match="without a plan"):
        session.accumulate(golden.batch_of(tiny(), "low rank"))


def test_a_word_from_a_file_is_read_as_its_vectors(tiny: Any, opened: Any) -> None:
    session = opened(tiny())
    known = session.encode_text(["a photo of red cat", "a photo of dog"])["hidden_states"]
    table = session._components["text_encoder"].text_model.embeddings.token_embedding.embedding_table.asnumpy()
    rows = table[session._words["text_encoder"].split("red cat")]
    told = session.load_adapters([(Adapter("sd1", {}, [Embedding("<toy>", {"text_encoder": in_memory(rows)})]), 1.0)])
    assert told == ["<toy> is a word of 2 vectors."]
    again = session.encode_text(["a photo of <toy>", "a photo of dog"])["hidden_states"]
    np.testing.assert_array_equal(again, known)
    wide = Embedding("<wide>", {"text_encoder": in_memory(np.zeros((1, 99), np.float32))})
    with pytest.raises(ConversionError, match="99 wide"):
        session.load_adapters([(Adapter("sd1", {}, [wide]), 1.0)])


def test_a_picture_does_not_depend_on_its_batch(tiny: Any, opened: Any) -> None:
    session = opened(tiny())
    prompts = ("a cat", "a dog", "a toy")
    together = session.sample(SampleRequest(prompts, (1, 2, 3), sampler="euler-a", steps=3, batch=3))
    alone = session.sample(SampleRequest(prompts[2:], (3,), sampler="euler-a", steps=3))
    assert together.shape == (3, 64, 64, 3)
    assert np.abs(alone.astype(int) - together[2:].astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - together[1].astype(int)).max() > 5


def test_a_process_stays_on_the_processors_it_was_given() -> None:
    code = (
        "import os; given = {min(os.sched_getaffinity(0))}; os.sched_setaffinity(0, given); "
        "from persona.plugins.backends.mindspore import MindSporeBackend; MindSporeBackend().capabilities('cpu'); "
        "import sys; assert 'mindspore' in sys.modules; "
        "print(all(os.sched_getaffinity(int(thread)) == given for thread in os.listdir('/proc/self/task')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
