"""What two processes say to each other arrives as it was said."""

import io
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from persona.core.adapters.entry import Adapter, Embedding, Entry, Magnitude, Scale
from persona.core.adapters.tensor import in_memory
from persona.core.host.contracts import Runtime, SampleRequest
from persona.core.training.batch import Batch
from persona.core.training.plan import LowRank, NewToken, NewTokens, Picture, Stream, TrainingPlan
from persona.environments.wire import receive, send
from persona.hub.bases import open_base


def there(value: Any) -> Any:
    """`value` as it arrives on the other side."""
    pipe = io.BytesIO()
    send(pipe, value)
    pipe.seek(0)
    arrived = receive(pipe)
    assert pipe.read() == b""
    return arrived


def batch() -> Batch:
    values = np.random.default_rng(3).standard_normal((2, 4, 8, 8)).astype(np.float32)
    numbers = np.array([0.25, 0.5], np.float32)
    return Batch(
        values, values[::-1], np.array([1, 999]), numbers, numbers, numbers, numbers, numbers,
        captions=("a cat", "шапка"), embeddings={"hidden_states": values[:, 0]}, mask=None,
    )  # fmt: skip


def test_plain_values_keep_their_kind() -> None:
    said = [None, True, 3, -0.0, "ж\ud800\n", (1, ("a",)), {"k": [1]}, {("unet", "to_q"): 1}, frozenset({"sd1"})]
    arrived = there(said)
    assert arrived == said
    assert [type(value) for value in arrived] == [type(value) for value in said]
    assert str(there(float("-inf"))) == "-inf"
    assert np.isnan(there(float("nan")))
    assert there(Path("a") / "b") == Path("a") / "b"
    assert there(np.float32(0.5)) == 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.bool_, "<U7", ">f4",
                                   ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)], ids=str)
def test_an_array_keeps_dtype_shape_and_bytes(dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    arrived = there({"x": values})["x"]
    assert (arrived.dtype, arrived.shape, arrived.tobytes()) == (values.dtype, values.shape, values.tobytes())
    arrived[...] = 1  # what arrives may be written to


def test_arrays_that_do_not_lie_in_one_piece_arrive_in_order() -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (values.T, values[:, ::2], values[::-1]):
        np.testing.assert_array_equal(there(view), view)


def test_a_micro_batch_arrives_whole() -> None:
    said, arrived = batch(), there(batch())
    assert isinstance(arrived, Batch)
    assert arrived.captions == said.captions
    for name in ("latents", "noise", "timesteps", "a", "w"):
        np.testing.assert_array_equal(getattr(arrived, name), getattr(said, name))
    np.testing.assert_array_equal(arrived.embeddings["hidden_states"], said.embeddings["hidden_states"])
    assert arrived.mask is None


def test_a_plan_a_base_and_a_request_arrive_equal() -> None:
    plan = TrainingPlan(
        "lora",
        (
            LowRank("unet", ("a.to_q",), 4, 2.0, 1e-4, ranks={"a.to_q": 8}),
            NewTokens(("text_encoder",), (NewToken("<cat>", "cat", 2),), 5e-3),
        ),
        (Stream("instance", (Picture("/a.png", ("a cat",), size=(3, 4)),)),),
        steps=3,
    )
    assert there(plan) == plan
    base = open_base("mini")
    assert there(base) == base
    for value in (Runtime("cuda:1", "bf16", log=Path("worker.log")), SampleRequest(("a",), (3,))):
        assert there(value) == value


def test_an_adapter_arrives_with_the_same_meaning() -> None:
    values = np.arange(8, dtype=np.float16)
    down, up = in_memory(values.reshape(2, 4)), in_memory(values.reshape(4, 2).astype(ml_dtypes.bfloat16))
    entry = Entry("unet", "a.to_q", "lora", {"down": down, "up": up}, Scale(1.0, 2, stored=in_memory(np.float32(1))),
                  magnitude=Magnitude(in_memory(values[:4]), "out"))  # fmt: skip
    words = Embedding("<cat>", {"text_encoder": in_memory(values.reshape(2, 4))})
    arrived = there(Adapter("sd1", {("unet", "a.to_q"): entry}, [words], {"note": "x"}, families=frozenset({"sd1"})))
    got = arrived.entries["unet", "a.to_q"]
    assert got.factors["up"].dtype == ml_dtypes.bfloat16
    assert got.factors["up"].read().tobytes() == up.read().tobytes()
    assert (got.scale, got.scale.stored.read()) == (entry.scale, np.float32(1))
    assert got.magnitude.axis == "out"
    np.testing.assert_array_equal(arrived.embeddings[0].vectors["text_encoder"].read(), values.reshape(2, 4))
    assert (arrived.families, arrived.metadata) == (frozenset({"sd1"}), {"note": "x"})


@pytest.mark.parametrize(
    "value",
    [object(), np.array([object()]), Exception("x"), lambda: None],
    ids=["an object", "an array of objects", "an exception", "a function"],
)
def test_what_is_no_plain_value_is_not_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        send(io.BytesIO(), value)


def test_a_class_that_is_not_on_the_list_is_not_made() -> None:
    text = b'{"value": {"class": "Popen", "fields": {"args": "true"}}, "arrays": []}'
    with pytest.raises(KeyError, match="Popen"):
        receive(io.BytesIO(struct.pack("<I", len(text)) + text))


@pytest.mark.parametrize("kept", [0, 2, 40, -1])
def test_a_message_that_breaks_off_is_the_end(kept: int) -> None:
    pipe = io.BytesIO()
    send(pipe, batch())
    with pytest.raises(EOFError):
        receive(io.BytesIO(pipe.getvalue()[:kept]))
