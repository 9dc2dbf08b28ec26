"""Every writer against every reader: names, shapes, ΔW and the dialect come back (dialects.md §12)."""

from __future__ import annotations

import numpy as np
import pytest

from persona.core.adapters.certificate import certify
from persona.core.adapters.conversion import Plan, plan
from persona.core.adapters.entry import Adapter
from persona.core.host.contracts import Dialect, Told
from persona.formats.dialects.recognise import DIALECTS, recognise
from tests.formats.dialects.synthetic import family_adapter
from tests.formats.dialects.written import state_of

DENOISER = ("unet",)
CASES = [
    ("diffusers", "sd1", None, True),
    ("diffusers", "sdxl", None, False),
    ("diffusers", "flux1", None, False),
    ("kohya", "sd1", None, True),
    ("kohya", "sd2", None, True),
    ("kohya", "sdxl", None, True),
    ("kohya", "sdxl-refiner", None, False),
    ("kohya", "flux1", None, False),
    ("kohya", "sd3", None, False),
    ("comfy", "sd1", None, True),
    ("comfy", "sd2", None, False),
    ("comfy", "sdxl", None, True),
    ("comfy", "flux1", None, False),
    ("comfy", "sd3", None, False),
    ("original", "sdxl", DENOISER, True),
    ("original", "flux1", ("transformer",), False),
    ("diffusers-legacy", "sd1", None, True),
    ("ppdiffusers", "sd1", None, True),
    ("ppdiffusers", "sdxl", None, False),
    ("mindone", "sdxl", None, False),
    ("mindone-kohya", "sd1", None, False),
    ("mindone-sdv2", "sd2", DENOISER, False),
    ("mindone-sdxl", "sdxl", DENOISER, False),
    ("mindpet", "sd1", DENOISER, False),
    ("diffsynth", "sdxl", DENOISER, False),
    ("diffsynth-2024", "sdxl", DENOISER, False),
    ("diffsynth", "flux1", ("transformer",), False),
]


def source(name: str, family: str, components: tuple[str, ...] | None, convolutions: bool, **more: object) -> Adapter:
    adapter = family_adapter(family, components=components, convolutions=convolutions, every=5, **more)  # type: ignore[arg-type]
    if DIALECTS[name].slots.attention_only:
        endings = ("to_q", "to_k", "to_v", "to_out.0")
        adapter.entries = {key: entry for key, entry in adapter.entries.items() if key[1].endswith(endings)}
    return adapter


def planned(adapter: Adapter, dialect: Dialect) -> Plan:
    container = dialect.slots.containers[0]
    made = plan(adapter, dialect.slots.within(container), dialect.name, fused_path=dialect.joined(adapter))
    made.demand()
    return made


def there(adapter: Adapter, dialect: Dialect) -> Adapter:
    (output,) = dialect.write(planned(adapter, dialect).adapter)
    return dialect.read(state_of(output, dialect.slots.containers[0]), Told())


@pytest.mark.parametrize("name, family, components, convolutions", CASES)
def test_what_is_written_is_recognised_and_means_the_same(
    name: str, family: str, components: tuple[str, ...] | None, convolutions: bool
) -> None:
    """P8: no dialect takes another's file for its own."""
    dialect, adapter = DIALECTS[name], source(name, family, components, convolutions)
    (output,) = dialect.write(planned(adapter, dialect).adapter)
    state = state_of(output, dialect.slots.containers[0])
    assert recognise(state)[0].dialect.name == name
    again = dialect.read(state, Told())
    assert again.leftovers == []
    assert family in again.families
    report = certify(adapter, again)
    assert report["missing"] == []
    assert report["worst_relative_error"] <= 1e-6
    assert report["added"] == [] or family in ("flux1", "sd3")  # joined modules show all their parts


@pytest.mark.parametrize("name, family, components, convolutions", CASES)
def test_a_second_trip_through_the_same_dialect_changes_no_bit(
    name: str, family: str, components: tuple[str, ...] | None, convolutions: bool
) -> None:
    """P1."""
    dialect, adapter = DIALECTS[name], source(name, family, components, convolutions)
    container = dialect.slots.containers[0]
    (first,) = dialect.write(planned(adapter, dialect).adapter)
    again = dialect.read(state_of(first, container), Told(family=family))
    (second,) = dialect.write(planned(again, dialect).adapter)
    assert list(first.tensors) == list(second.tensors)
    for key, ref in first.tensors.items():
        other = second.tensors[key]
        assert (ref.dtype, ref.shape) == (other.dtype, other.shape), key
        assert ref.read().tobytes() == other.read().tobytes(), key


@pytest.mark.parametrize("name, family, components, convolutions", CASES)
def test_going_there_and_back_to_diffusers_gives_the_same_bits(
    name: str, family: str, components: tuple[str, ...] | None, convolutions: bool
) -> None:
    """P2, P3: alpha is a power of two times the rank, so that folding is exact too."""
    dialect, adapter = DIALECTS[name], source(name, family, components, convolutions, dtype="float16")
    back = planned(there(adapter, dialect), DIALECTS["diffusers"]).adapter
    for key, entry in adapter.entries.items():
        other = back.entries[key]
        ours, theirs = entry.factors["down"].read(), other.factors["down"].read()
        assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes(), key
        ups = (entry.factors["up"].read() * np.float16(entry.scale.value)).tobytes()
        assert ups == (other.factors["up"].read() * np.float16(other.scale.value)).tobytes(), key


def test_a_scale_that_is_no_power_of_two_folds_with_one_rounding() -> None:
    """P3: at most half a unit in the last place of the stored dtype."""
    adapter = family_adapter("sd1", rank=3, alpha=1.0, every=9, dtype="float16")
    made = planned(adapter, DIALECTS["diffusers-legacy"])
    assert made.cost == "one rounding"
    for key, entry in made.adapter.entries.items():
        exact = adapter.entries[key].factors["up"].read().astype(np.float64) / 3
        error = np.abs(entry.factors["up"].read().astype(np.float64) - exact)
        assert np.all(error <= np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64) * 0.5001)


def test_two_scales_never_give_the_same_file() -> None:
    """P9."""
    for name, family, components, convolutions in CASES:
        dialect = DIALECTS[name]
        files = []
        for alpha in (1.0, 2.0):
            adapter = source(name, family, components, convolutions, alpha=alpha)
            adapter.entries = dict(list(adapter.entries.items())[:4])
            (output,) = dialect.write(planned(adapter, dialect).adapter)
            values = {key: ref.read().tobytes() for key, ref in output.tensors.items()}
            files.append((values, output.metadata.get("lora_adapter_metadata")))
        assert files[0] != files[1], name


@pytest.mark.parametrize(
    "family, convolutions, expected",
    [("sd1", False, 192), ("sd1", True, 278), ("sdxl", False, 722), ("sdxl", True, 788), ("sdxl-refiner", True, 548)],
)
def test_kohya_files_have_as_many_modules_as_kohyas_own(family: str, convolutions: bool, expected: int) -> None:
    """P5, T1, T37b; the names of SDXL are all the original's."""
    adapter = family_adapter(family, components=["unet"], convolutions=convolutions, real=True)
    (output,) = DIALECTS["kohya"].write(adapter)
    modules = {key.split(".")[0] for key in output.tensors}
    assert len(modules) == expected
    if family != "sd1":
        assert all(m.split("_")[2] in ("input", "middle", "output") for m in modules)
    again = DIALECTS["kohya"].read(state_of(output), Told())
    assert again.entries.keys() == adapter.entries.keys()


def test_the_embedded_base_with_other_block_numbers_goes_everywhere_and_back() -> None:
    """`mini`: two levels, one layer per block, attention in both."""
    from persona.core.adapters.unet import UNet
    from tests.formats.dialects.synthetic import lora, wanted

    mini = UNet(channels=(96, 160), depth=(1, 1), mid_depth=1, context=192, layers_per_block=1)
    adapter = Adapter(None, {}, families=frozenset({"sd1", "sd2", "wukong"}))
    for seed, module in enumerate(
        m for m in mini.modules() if wanted("unet", m, convolutions=False) and "attn" in m.path and ".to_" in m.path
    ):
        adapter.entries[("unet", module.path)] = lora("unet", module, rank=2, alpha=1.0, seed=3 * seed, dtype="float32")
    for name in (
        "diffusers",
        "kohya",
        "comfy",
        "original",
        "diffusers-legacy",
        "ppdiffusers",
        "mindone",
        "mindpet",
        "mindone-sdv2",
    ):
        again = there(adapter, DIALECTS[name])
        assert certify(adapter, again)["worst_relative_error"] <= 1e-6, name
        assert again.entries.keys() == adapter.entries.keys(), name
