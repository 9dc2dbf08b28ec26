"""kohya-ss/sd-scripts and A1111: flat names behind `lora_unet_` and `lora_te_`, alpha beside each module, with the
algorithms of LyCORIS (dialects.md §5.3, §5.4).

SD1 and SD2 use diffusers' names, SDXL the original's (A1111 knows no others), Flux and SD3 the original's with joined
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.slots import LYCORIS, Slots
from persona.core.host.errors import ConversionError
from persona.formats.dialects.ia3 import as_lycoris
from persona.formats.dialects.metadata import carried, common
from persona.formats.dialects.original_places import OriginalNames, joined_paths, original_denoiser_names
from persona.formats.dialects.places import diffusers_path
from persona.formats.dialects.table import Place, TableDialect
from persona.formats.models.families import FAMILIES
from persona.formats.models.flat import flatten, unflatten

DENOISERS = ("lora_unet_", "oft_unet_", "lora_transformer_", "lycoris_")
ENCODERS = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "oft_te_": "text_encoder",
}
ORIGINAL_FAMILIES = frozenset({"sdxl", "sdxl-refiner", "kolors", "flux1", "sd3"})
SEVERAL_ENCODERS = frozenset({"sdxl", "sdxl-refiner", "flux1", "sd3"})
SUFFIXES = {
    "down": ".lora_down.weight",
    "up": ".lora_up.weight",
    "mid": ".lora_mid.weight",
    "alpha": ".alpha",
    "dora_scale": ".dora_scale",
    "scalar": ".scalar",
    **{f"w{k}_{side}": f".hada_w{k}_{side}" for k in "12" for side in "ab"},
    "t1": ".hada_t1",
    "t2": ".hada_t2",
    "diff": ".diff",
    "diff_b": ".diff_b",
    "w_norm": ".w_norm",
    "b_norm": ".b_norm",
    "weight": ".weight",
    "on_input": ".on_input",
    **{name: f".{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm")},
    **{name: f".{name}" for name in ("oft_blocks", "oft_diag", "rescale")},
}
LOKR_SUFFIXES = {
    **SUFFIXES,
    **{name: f".lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
SPELLINGS = frozenset({"kohya", "loha", "lokr", "full", "norm", "ia3", "glora", "oft"})


def suffixes_of(entry: Entry) -> dict[str, str]:
    """LoHa and LoKr use the same factor names under different suffixes."""
    return LOKR_SUFFIXES if entry.algorithm == "lokr" else SUFFIXES


def places(modules: Collection[str]) -> Callable[[str], Place | None]:
    """Flat names, looked up by cutting them into words: diffusers' or the original's, told apart by themselves."""
    dotted = {module: _denoiser_words(module) for module in modules}
    names = OriginalNames.of([name for name in dotted.values() if name])

    def place(module: str) -> Place | None:
        for prefix, component in ENCODERS.items():
            if module.startswith(prefix):
                return _encoder(component, unflatten(module[len(prefix) :]))
        name = dotted.get(module) or _denoiser_words(module)
        if not name:
            return None
        return names.denoiser(name) or _diffusers(name)

    return place


def _denoiser_words(module: str) -> str | None:
    for prefix in DENOISERS:
        if module.startswith(prefix) and "." not in module:
            return unflatten(module[len(prefix) :])
    return None


def _diffusers(name: str) -> Place:
    component = "unet" if name.startswith(("down_", "up_", "mid_", "conv_", "time_emb", "add_emb")) else "transformer"
    return Place(component, diffusers_path(component, name), name)


def _encoder(component: str, name: str) -> Place:
    """T5 wherever it is found is the third encoder (OneTrainer calls Flux' T5 te2)."""
    if name.startswith(("encoder.block.", "shared")):
        return Place("text_encoder_3", name, name)
    return Place(component, diffusers_path(component, name), name)


def names(adapter: Adapter) -> Callable[[Entry], str]:
    """The flat name of each module in the style of the adapter's family."""
    candidates = {adapter.family} if adapter.family else set(adapter.families)
    styles = {name in ORIGINAL_FAMILIES for name in candidates} or {False}
    if len(styles) > 1:
        ordered = [name for name in FAMILIES if name in candidates]
        raise ConversionError(
            f"kohya spells {'/'.join(ordered)} differently, and the names leave all of them open.",
            hint=f"--family {ordered[0]}",
        )
    original = original_denoiser_names(adapter) if styles == {True} else None
    several = bool(candidates & SEVERAL_ENCODERS) or any(
        entry.component in ("text_encoder_2", "text_encoder_3") for entry in adapter.entries.values()
    )
    flux = candidates == {"flux1"}

    def name_of(entry: Entry) -> str:
        oft = is_own_oft(entry)
        if entry.component in ("unet", "transformer"):
            return ("oft_unet_" if oft else "lora_unet_") + flatten(original(entry) if original else entry.path)
        prefix = "oft_te_" if oft else _encoder_prefix(entry.component, several=several, flux=flux)
        return prefix + flatten(entry.path)

    return name_of


def is_own_oft(entry: Entry) -> bool:
    """Whether it is sd-scripts' own OFT, which the prefix alone tells from LyCORIS' with the same factors: it always
    holds the norm to alpha times the width, LyCORIS only where alpha is not 0 (dialects.md §4.6)."""
    return entry.algorithm == "oft" and any(key.startswith("oft_") for key in entry.origin.values())


def _encoder_prefix(component: str, *, several: bool, flux: bool) -> str:
    if component == "text_encoder":
        return "lora_te1_" if several else "lora_te_"
    return "lora_te3_" if component == "text_encoder_3" or flux else "lora_te2_"


def header(adapter: Adapter) -> dict[str, str]:
    """The source's metadata and what A1111 and kohya's tools look for (dialects.md §7.1); a rank the source states
    stays where it is still one of the ranks."""
    kept = {key: value for key, value in carried(adapter).items() if key != "lora_adapter_metadata"}
    made = described(adapter)
    ranks = {f"{entry.scale.rank:g}" for entry in adapter.entries.values()}
    if "ss_network_dim" in made and kept.get("ss_network_dim") not in ranks:
        kept = {key: value for key, value in kept.items() if key not in ("ss_network_dim", "ss_network_alpha")}
    return {**made, **kept}


def described(adapter: Adapter) -> dict[str, str]:
    """The keys by which kohya's tools and A1111 know what an adapter is and which base it is for."""
    entries = list(adapter.entries.values())
    candidates = [adapter.family] if adapter.family else [name for name in FAMILIES if name in adapter.families]
    base = FAMILIES.get(candidates[0]) if candidates else None
    made = {
        "ss_v2": str(base is not None and base.name == "sd2"),
        "ss_base_model_version": base.base_version if base else "",
        "ss_network_module": "networks.lora" if {e.algorithm for e in entries} <= {"lora"} else "lycoris.kohya",
        "ss_network_args": "{}",
    }
    scaled = [entry for entry in entries if entry.scale.mode != "none"]
    if scaled:
        made["ss_network_dim"] = common([float(entry.scale.rank) for entry in scaled])
        made["ss_network_alpha"] = common([entry.scale.value * entry.scale.rank for entry in scaled])
    return made


DIALECT = TableDialect(
    name="kohya",
    summary="sd-scripts, A1111 and LyCORIS: flat names, alpha beside each module",
    slots=Slots(
        algorithms=LYCORIS,
        alpha="module",
        magnitude=frozenset({"out", "in"}),
        tucker=True,
        fused=True,
        embeddings="bundle",
        containers=("safetensors", "torch"),
    ),
    places=places,
    names=names,
    spellings=SPELLINGS | {"peft"},
    suffixes_of=suffixes_of,
    header=header,
    original=True,
    joined=joined_paths,
    shaped=lambda adapter: as_lycoris,
    priority=40,
)
