"""PEFT's OFT and BOFT by hand; tests/peers/test_peft_methods.py compares with PEFT itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from persona.core.adapters.delta import delta
from persona.core.adapters.entry import Entry
from persona.core.adapters.tensor import in_memory
from persona.core.host.contracts import Output, Told
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.dialects.peft_folder import CONFIG, DIALECT
from tests.formats.dialects.written import state_of

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
RNG = np.random.default_rng(37)


def rotation(config: dict[str, Any], **shapes: tuple[int, ...]) -> Entry:
    tensors = {f"base_model.model.{QUERY}.{name}": RNG.standard_normal(shape) for name, shape in shapes.items()}
    tensors = {f"{key}.weight" if key.endswith(".oft_R") else key: value for key, value in tensors.items()}
    state = state_of(Output({key: in_memory(value.astype(np.float32)) for key, value in tensors.items()}))
    (entry,) = DIALECT.read(state, Told(configs={CONFIG: config})).entries.values()
    return entry


OFT = {"peft_type": "OFT", "oft_block_size": 4, "peft_version": "0.21.2@main"}
NEUMANN = {**OFT, "use_cayley_neumann": True}


@pytest.mark.parametrize("shared", [False, True])
def test_pefts_oft_turns_the_inputs_block_by_block(shared: bool) -> None:
    """(I − Q)·(I + Q)⁻¹ of each block, by hand: it is orthogonal, and W' = W·Rᵀ. A loop over rows and blocks."""
    entry = rotation(OFT, oft_R=(1 if shared else 2, 6))
    base = RNG.standard_normal((5, 8))
    after = base + delta(entry, base)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), np.linalg.norm(base, axis=1), rtol=1e-5)
    upper = np.asarray(entry.factors["oft_R"], np.float64)
    for block in range(2):
        skew, at = np.zeros((4, 4)), 0
        for row in range(4):
            for column in range(row + 1, 4):
                skew[row, column] = upper[0 if shared else block][at]
                at += 1
        skew -= skew.T
        turn = np.linalg.solve((np.eye(4) + skew).T, (np.eye(4) - skew).T).T
        part = slice(4 * block, 4 * block + 4)
        np.testing.assert_allclose(after[:, part], base[:, part] @ turn.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("terms", "last"), [(1, 0), (2, 2), (5, 1)])
def test_the_series_of_pefts_oft_is_cut_as_peft_cuts_it(terms: int, last: int) -> None:
    entry = rotation({**NEUMANN, "num_cayley_neumann_terms": terms}, oft_R=(2, 1))
    small = np.asarray(entry.factors["oft_R"], np.float64)[0, 0]
    skew, turn = np.array([[0, small], [-small, 0]]), np.eye(2)
    for power in range(1, terms):
        turn = turn + (last if power == terms - 1 else 2) * np.linalg.matrix_power(skew, power)
    base = np.eye(4)
    np.testing.assert_allclose((base + delta(entry, base))[:2, :2], turn.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "shapes", "words"),
    [
        ({"peft_type": "OFT"}, {"oft_R": (2, 6)}, "before 0.16"),
        (OFT, {"oft_R": (2, 5)}, "before 0.16"),
        (OFT, {"oft_R": (2, 4, 4)}, "before 0.16"),
        ({**NEUMANN, "peft_version": "0.17.1"}, {"oft_R": (2, 6)}, "PEFT before 0.18"),
        ({**NEUMANN, "peft_version": None}, {"oft_R": (2, 6)}, "PEFT before 0.18"),
        ({**OFT, "coft": True}, {"oft_R": (2, 6)}, "coft"),
        ({"peft_type": "BOFT"}, {"boft_R": (2, 2, 4, 4), "boft_s": (8, 1)}, "2 butterfly factors"),
        ({"peft_type": "BOFT"}, {"boft_R": (1, 2, 4, 4)}, "boft_s"),
    ],
)
def test_rotations_that_cannot_be_known_are_refused(config: Any, shapes: Any, words: str) -> None:
    with pytest.raises(UnreadableFile, match=words):
        rotation(config, **shapes)


def test_a_rotation_of_another_base_is_told() -> None:
    with pytest.raises(ConversionError, match="2 blocks of 4 do not make up the 12 inputs"):
        delta(rotation(OFT, oft_R=(2, 6)), np.ones((5, 12)))
