"""What benchmarks/matrix.py measures with, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _its_folder(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), str(BENCHMARKS.parent), *sys.path])


def test_the_distance_of_low_rank_products_is_that_of_the_matrices():
    from matrix_measure import distance

    random = np.random.default_rng(3)
    first = 0.75, random.standard_normal((6, 2)).astype(np.float16), random.standard_normal((2, 5)).astype(np.float16)
    second = 1.5, random.standard_normal((6, 3)).astype(np.float16), random.standard_normal((3, 5)).astype(np.float16)
    one, other = (s * (u.astype(np.float64) @ d.astype(np.float64)) for s, u, d in (first, second))
    assert distance(first, second) == pytest.approx(np.linalg.norm(other - one) / np.linalg.norm(one), rel=1e-9)
    assert distance(first, first) == 0.0
    assert distance(first, (1.5, *first[1:])) == pytest.approx(1.0, rel=1e-9)  # twice as strong


def test_a_joined_module_is_taken_apart_by_rows():
    from matrix_measure import low_rank

    from persona.core.adapters.entry import Adapter, Entry, Scale
    from persona.core.adapters.tensor import in_memory

    up, down = np.arange(12.0, dtype=np.float32).reshape(6, 2), np.ones((2, 2), np.float32)
    factors = {"up": in_memory(up), "down": in_memory(down)}
    entry = Entry("transformer", "block.[to_q,to_k,to_v]", "lora", factors, Scale(3.0, 2))
    parts = low_rank(Adapter("sd3", {("transformer", entry.path): entry}))
    assert list(parts) == [f"transformer.block.{name}" for name in ("to_q", "to_k", "to_v")]
    assert parts["transformer.block.to_k"][0] == 1.5
    assert parts["transformer.block.to_k"][1].tolist() == [[4.0, 5.0], [6.0, 7.0]]


def test_the_adapter_has_one_whole_block_of_each_form_and_width():
    from matrix_adapters import weights

    from persona.formats.models.families import FAMILIES

    sizes = {module.path: module.shape for module in weights(FAMILIES["flux1"].components["transformer"][0])}
    blocks = {path.split(".")[0] + "." + path.split(".")[1] for path in sizes if "transformer_blocks." in path}
    assert blocks == {"transformer_blocks.0", "single_transformer_blocks.0"}
    assert sizes["transformer_blocks.0.ff.net.0.proj"] == (12288, 3072)
    assert sizes["single_transformer_blocks.0.proj_out"] == (3072, 15360)

    unet = {module.path: module.shape for module in weights(FAMILIES["sd1"].components["unet"][0])}
    assert {shape for path, shape in unet.items() if path.endswith("attn1.to_q")} == {
        (320,) * 2,
        (640,) * 2,
        (1280,) * 2,
    }
    assert unet["down_blocks.1.resnets.0.conv1"] == (640, 320, 3, 3)
    assert unet["down_blocks.1.resnets.0.conv_shortcut"] == (640, 320, 1, 1)


def test_a_dialect_that_holds_attention_alone_holds_a_part_and_says_so(tmp_path):
    import matrix
    from matrix_adapters import plain_lora

    from persona.exchange.convert import Wish, deliver

    adapter = plain_lora("sd1")
    wish = Wish(to="mindone-sdv2", family="sd1", drop=True)
    report = deliver(adapter, [], tmp_path / "part.ckpt", wish, matrix.host())
    dropped = matrix.left_out(report.steps)
    held = {f"{component}.{path}" for component, path in adapter.entries} - set(dropped)
    assert held and all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in held)
    assert any(name.startswith("text_encoder.") for name in dropped)
    assert matrix.letter_of(report.steps) == "F"
    assert str(matrix.Cell("F", dropped=len(dropped))) == "F◐"
