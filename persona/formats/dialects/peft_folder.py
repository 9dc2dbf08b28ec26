"""PEFT's own folders: `adapter_model.safetensors` with `base_model.model.` keys beside `adapter_config.json`
(dialects.md §5.5). One folder holds one component; several components are several folders.

Source: huggingface/peft utils/save_and_load.py, tuners/{lora,loha,lokr}/config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.evidence import is_known
from persona.core.adapters.slots import Slots
from persona.core.adapters.tensor import TensorRef
from persona.core.host.contracts import Evidence, Output, State, Told
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.dialects import ia3
from persona.formats.dialects.entries import StoredScale
from persona.formats.dialects.lora_config import alpha_from, patterned
from persona.formats.dialects.metadata import carried
from persona.formats.dialects.peft_components import auto_mapping, components_told, spellings
from persona.formats.dialects.peft_methods import METHODS, apart, config_for, in_folder
from persona.formats.dialects.peft_rotation import told_form
from persona.formats.dialects.places import diffusers_path, prefixed, unprefixed
from persona.formats.dialects.spelling import in_modules_shape, spelled
from persona.formats.dialects.table import Place, TableDialect, anywhere
from persona.formats.models.families import FAMILIES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEFAULT_ALPHA = 8
"""What PEFT takes where a config leaves alpha out (LoraConfig, LoHaConfig, LoKrConfig)."""
READABLE = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT")
SUFFIXES = {
    "down": ".lora_A.weight",
    "up": ".lora_B.weight",
    "bias": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector",
    **{f"w{k}_{side}": f".hada_w{k}_{side}" for k in "12" for side in "ab"},
    "t1": ".hada_t1",
    "t2": ".hada_t2",
    "ia3_l": ".ia3_l",
}
LOKR_SUFFIXES = {name: f".lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}


def place(module: str, components: Sequence[str] = ()) -> Place | None:
    """`base_model.model.<path>`, perhaps with a component in between; else it is the first of `components`, those that
    the folder or its config name, to have such a module."""
    name = module.removeprefix("base_model.model.")
    if name == module:
        return None
    written = prefixed(name)
    if written is not None:
        return written
    for component in components:
        path = diffusers_path(component, name)
        if is_known(component, path, FAMILIES):
            return Place(component, path, name)
    if name.startswith("encoder.block."):  # T5, third in SD3 and second in Flux.1
        return Place("text_encoder_3", name, name)
    return unprefixed(name)


def scales(state: State, told: Told) -> StoredScale:
    """Alpha from adapter_config.json. Raises UnreadableFile for a method that cannot be read, or whose base was
    changed at the start (PiSSA and the like, dialects.md §4.1)."""
    config = told.configs.get(CONFIG, {})
    check_config(config)
    unsaid = config.get("peft_type") in ("LORA", "LOHA", "LOKR") and not {"lora_alpha", "alpha"} & config.keys()
    complete = {**config, "lora_alpha": DEFAULT_ALPHA} if unsaid else config

    def scale(component: str, module: str, rank: int) -> tuple[float, str, str] | None:
        found = alpha_from(complete, module)
        if found is None:
            return None
        alpha, mode = found
        if config.get("peft_type") == "LOKR":  # PEFT divides by its own r even where both factors are whole
            alpha *= rank / _rank(config, module, rank)
        return alpha, mode, "config"

    return scale


def _rank(config: Mapping[str, Any], module: str, rank: int) -> float:
    value = patterned(config, "rank_pattern", module, config.get("r", rank))
    return float(value) if isinstance(value, int | float) and value > 0 else float(rank)


BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How init_lora_weights begins where the base was changed at the start (dialects.md §4.1)."""
NOT_A_PRODUCT = {
    "kasa_config": "the base was truncated at the start",
    "arrow_config": "several adapters are mixed anew for every input",
    "alora_invocation_tokens": "it acts on some words of a text only",
    "use_qalora": "its inputs are averaged in groups",
    "use_bdlora": "its factors are block-diagonal",
    "layer_replication": "the base has some layers twice",
}
"""Fields of LoraConfig with which a module is not W + scale·up·down. Source: peft 0.21 tuners/lora/variants.py."""


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what cannot be read as an adapter of the plain base. Raises UnreadableFile."""
    kind = config.get("peft_type", "LORA")
    if kind not in READABLE:
        raise UnreadableFile(f"This is a PEFT {kind} adapter; persona reads {', '.join(READABLE)}.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGED):
        raise UnreadableFile(
            f"init_lora_weights is {start!r}: training changed the base too, so they mean nothing on the plain one.",
            hint="Save it again in PEFT with path_initial_model_for_weight_conversion.",
        )
    for field, reason in NOT_A_PRODUCT.items():
        if config.get(field):
            raise UnreadableFile(f"{CONFIG} has {field}: {reason}, so the factors alone do not say what it does.")


TABLE = TableDialect(
    name="peft",
    summary="PEFT folders: adapter_model.safetensors and adapter_config.json, one per component",
    slots=Slots(
        algorithms=METHODS,
        ia3="peft",
        alpha="config",
        magnitude=frozenset({"out"}),
        magnitude_on_all=True,
        bias=True,
        folder=True,
        containers=("safetensors",),
    ),
    places=anywhere(place),
    spellings=frozenset({"peft", "peft module", "loha", "lokr", "ia3", "oft"}),
    scales=scales,
    priority=90,
)


class PeftFolder:
    """The table above, and the folders it is written as."""

    name, summary, slots, priority = TABLE.name, TABLE.summary, TABLE.slots, TABLE.priority
    locator, scales = TABLE.locator, staticmethod(scales)
    families = None

    def joined(self, adapter: Adapter) -> Callable[[Entry], str | None]:
        """PEFT's models are diffusers': nothing is joined."""
        return lambda entry: None

    def detect(self, state: State, siblings: Sequence[str]) -> Evidence:
        """See Dialect.detect."""
        return TABLE.detect(state, siblings)

    def read(self, state: State, told: Told) -> Adapter:
        """See Dialect.read. The keys do not say which component they belong to: the config does, or the folder's name
        when it is a component's."""
        components = components_told(state, told)
        adapter = replace(TABLE, places=anywhere(lambda module: place(module, components))).read(state, told)
        config = told.configs.get(CONFIG)
        for key, entry in adapter.entries.items():
            if "ia3_l" in entry.factors:
                adapter.entries[key] = ia3.told_side(entry, config)
            elif config is not None and entry.algorithm in ("oft", "boft"):
                adapter.entries[key] = told_form(entry, config)
        return adapter

    def speller(self, adapter: Adapter) -> Callable[[Entry], dict[str, TensorRef]]:
        """See TableDialect.speller."""
        entries = list(adapter.entries.values())
        components = dict.fromkeys(entry.component for entry in entries)
        mappings = {one: auto_mapping(one, [e for e in entries if e.component == one], adapter) for one in components}
        shape = in_modules_shape(adapter)
        return lambda entry: _tensors(shape(entry), mappings[entry.component])

    def apart(self, entries: Sequence[Entry]) -> str | None:
        """Why the modules of one component cannot all stay in the method they have, or None when they can."""
        return apart(entries)

    def write(self, adapter: Adapter) -> Sequence[Output]:
        """Weights and config for each component, in a folder of its own when there are several."""
        components = list(dict.fromkeys(entry.component for entry in adapter.entries.values()))
        outputs = []
        for component in components:
            entries = [entry for entry in adapter.entries.values() if entry.component == component]
            outputs += _folder("" if len(components) == 1 else f"{component}/", component, entries, adapter)
        if not outputs:
            raise ConversionError("There is no module to write.")
        return outputs


def _folder(prefix: str, component: str, entries: Sequence[Entry], adapter: Adapter) -> list[Output]:
    tensors = {}
    mapping, shape = auto_mapping(component, entries, adapter), in_modules_shape(adapter)
    for entry in entries:
        tensors.update(_tensors(shape(entry), mapping))
    config = {
        "task_type": None,
        "auto_mapping": mapping,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "modules_to_save": None,
        **config_for(entries),
    }
    metadata = {k: v for k, v in carried(adapter).items() if k != "lora_adapter_metadata"}
    return [
        Output(tensors, {**metadata, "format": "pt"}, prefix + WEIGHTS),
        Output(name=prefix + CONFIG, document=config),
    ]


def _tensors(entry: Entry, mapping: Mapping[str, str] | None) -> dict[str, TensorRef]:
    made: dict[str, TensorRef] = {}
    suffixes = LOKR_SUFFIXES if entry.algorithm == "lokr" else SUFFIXES
    for name in spellings(entry.path, mapping):
        made.update(spelled(in_folder(entry), f"base_model.model.{name}", suffixes, TABLE.slots, ()))
    return made


DIALECT = PeftFolder()
