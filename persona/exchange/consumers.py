"""Which tools load a file as it is, and what each would ignore without a word.

Facts, not guesses: measured with the tools' own loaders or read in their sources (dialects.md §5, §8 and §9 with the
issues cited there; for diffusers the versions 0.35 and 0.42)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from persona.core.adapters.entry import Adapter, Entry

LYCORIS_ONLY = frozenset({"loha", "lokr", "full", "norm", "ia3", "glora", "oft", "boft", "opaque"})
Loads = Literal["all", "part", "nothing", "refuses"]
Test = Callable[[Entry], bool]
Company = Callable[[Sequence[Entry]], bool]


@dataclass(frozen=True)
class Rule:
    """Modules for which `test` holds are handled as `words` say; `refuses` when the whole file then fails to load.
    `beside` is a condition on all modules of the same component, where what a tool does depends on them."""

    test: Test
    words: str
    refuses: bool = False
    beside: Company | None = None

    def count(self, entries: Sequence[Entry]) -> int:
        """How many of a file's modules it is about."""
        beside = self.beside
        if beside is None:
            return sum(self.test(entry) for entry in entries)
        components = {entry.component for entry in entries}
        fitting = {name for name in components if beside([entry for entry in entries if entry.component == name])}
        return sum(entry.component in fitting and self.test(entry) for entry in entries)


@dataclass(frozen=True)
class Tool:
    """A reader: the dialects and containers it opens, and its rules for modules. `other` says what it does with a
    dialect it does not know; `bundles` whether it reads words bundled in the file; `forms` are the embeddings it opens,
    each with what to know about it."""

    name: str
    dialects: frozenset[str]
    containers: frozenset[str]
    other: str = "finds no module in it"
    rules: tuple[Rule, ...] = ()
    bundles: bool = False
    forms: Mapping[str, str] = field(default_factory=dict)
    one_token: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a tool does with a file: `loads`, in words `why`, and what it `ignores`."""

    tool: str
    loads: Loads
    why: str = ""
    ignores: tuple[str, ...] = ()


def _algorithm(*names: str) -> Test:
    return lambda entry: entry.algorithm in names


def _is_dora(entry: Entry) -> bool:
    return entry.magnitude is not None


def _is_tucker(entry: Entry) -> bool:
    return bool({"mid", "t1", "t2"} & entry.factors.keys())


def _is_lycoris(entry: Entry) -> bool:
    return entry.algorithm in LYCORIS_ONLY


def _alpha_in_header(entry: Entry) -> bool:
    return entry.scale.origin == "header" and entry.scale.value != 1.0


def _flat_diffusers_sdxl(entry: Entry) -> bool:
    """SDXL names that only diffusers-minded readers know (diffusers#6894)."""
    deep = entry.component == "unet" and ".transformer_blocks.1." in entry.path
    return deep and any(key.startswith(("lora_unet_down_blocks", "lora_unet_up_blocks", "lora_unet_mid_block"))
                        for key in entry.origin.values())  # fmt: skip


def _without_component(entry: Entry) -> bool:
    return not any(key.startswith(("unet.", "text_encoder", "transformer.", "lora_")) for key in entry.origin.values())


def _has(entries: Sequence[Entry], *ends: str) -> bool:
    return any(entry.path.endswith(ends) for entry in entries)


_FEED_FORWARD = ("mlp.fc1", "mlp.fc2")


def _clip_attention_in_kohyas(entry: Entry) -> bool:
    attention = entry.path.endswith(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    return attention and any(key.startswith("lora_te") for key in entry.origin.values())


def _clip_feed_forward_in_pefts(entry: Entry) -> bool:
    return entry.path.endswith(_FEED_FORWARD) and any(".lora_A." in key for key in entry.origin.values())


SAFE, PICKLE = "safetensors", "torch"
_HEADER_ALPHA = Rule(_alpha_in_header, "alpha in the header is not looked at, so the strength is wrong (Comfy#12191)")
_DIFFUSERS_RULES = (
    Rule(_without_component, "keys do not say their component: 0 modules, a warning only", refuses=True),
    Rule(_is_lycoris, "fails on LyCORIS keys: “keys have not been correctly renamed”", refuses=True),
    Rule(_is_tucker, "fails on Tucker factors (lora_mid; diffusers#11943)", refuses=True),
    Rule(lambda entry: _is_dora(entry) and "dora_scale" in entry.origin, "dora_scale is dropped: the result is wrong"),
    # state_dict_utils tells its own older spellings apart by one name each: out_proj's, and attention's
    Rule(
        _clip_attention_in_kohyas,
        "fails on a text encoder without out_proj: “Could not automatically infer state dict type”",
        refuses=True,
        beside=lambda entries: not _has(entries, "out_proj", *_FEED_FORWARD),
    ),
    Rule(
        _clip_attention_in_kohyas,
        "a text encoder's attention without out_proj is dropped with a warning only",
        beside=lambda entries: not _has(entries, "out_proj") and _has(entries, *_FEED_FORWARD),
    ),
    Rule(
        _clip_feed_forward_in_pefts,
        "fails on a text encoder without attention: “Could not automatically infer state dict type”",
        refuses=True,
        beside=lambda entries: not _has(entries, "q_proj", "k_proj", "v_proj", "out_proj"),
    ),
)
TOOLS: tuple[Tool, ...] = (
    Tool(
        "diffusers",
        frozenset({"diffusers", "diffusers-legacy", "kohya", "xlabs", "mindone"}),
        frozenset({SAFE, PICKLE}),
        "loads 0 modules and only warns",
        _DIFFUSERS_RULES,
        forms={
            "diffusers": "",
            "a1111": "",
            "kohya": "the token becomes emb_params unless token= is given",
            "clip-pair": "clip_l and clip_g have to be passed by hand, one call each (diffusers#8854)",
        },
        one_token=True,
    ),
    Tool(
        "A1111, Forge",
        frozenset({"kohya"}),
        frozenset({SAFE, PICKLE}),
        "the file has no effect",
        (Rule(_flat_diffusers_sdxl, "SDXL modules under diffusers' names have no effect (diffusers#6894)"),),
        bundles=True,
        forms={"kohya": "", "clip-pair": "", "a1111": "", "diffusers": "its word is the file's name"},
        one_token=True,
    ),
    Tool(
        "ComfyUI",
        frozenset({"kohya", "comfy", "diffusers", "diffusers-legacy", "original"}),
        frozenset({SAFE, PICKLE}),
        "prints “lora key not loaded” for every key",
        (
            _HEADER_ALPHA,
            Rule(_algorithm("ia3"), "has no reader for IA3"),
            Rule(
                lambda entry: _is_dora(entry) and entry.magnitude is not None and entry.magnitude.axis == "out",
                "older versions normalise DoRA by the wrong weight (Comfy PR#15458)",
            ),
        ),
        forms={"kohya": "", "clip-pair": "", "a1111": "", "diffusers": "its word is the file's name"},
        one_token=True,
    ),
    Tool(
        "sd-scripts (kohya)",
        frozenset({"kohya"}),
        frozenset({SAFE, PICKLE}),
        "refuses it",
        (
            Rule(_is_tucker, "its own reader stops at lora_mid (sd-scripts#425); LyCORIS' does not", refuses=True),
            Rule(_is_lycoris, "needs the lycoris-lora package"),
        ),
        forms={"kohya": "", "clip-pair": ""},
        one_token=True,
    ),
    Tool("PEFT", frozenset({"peft"}), frozenset({SAFE, PICKLE}), "finds no adapter_config.json for it"),
    Tool(
        "ppdiffusers",
        frozenset({"ppdiffusers", "kohya"}),
        frozenset({"paddle", SAFE}),
        "fails on its keys",
        (Rule(_is_lycoris, "knows plain LoRA only", refuses=True),),
        forms={"ppdiffusers": "", "diffusers": ""},
        one_token=True,
    ),
    Tool(
        "mindone.diffusers",
        frozenset({"diffusers", "diffusers-legacy", "mindone"}),
        frozenset({SAFE, "mindspore"}),
        "finds no module in it",
        (Rule(_alpha_in_header, "0.3 does not look at alpha in the header, so the strength is wrong; 0.5 does"),),
        forms={"diffusers": ""},
        one_token=True,
    ),
    Tool(
        "MindONE stable_diffusion_v2",
        frozenset({"mindone-sdv2"}),
        frozenset({"mindspore"}),
        forms={"mindone-ti": ""},
    ),
    Tool("MindONE stable_diffusion_xl", frozenset({"mindone-sdxl"}), frozenset({"mindspore"})),
    Tool("Wukong (mindpet)", frozenset({"mindpet"}), frozenset({"mindspore"})),
    Tool("DiffSynth-Studio", frozenset({"diffsynth", "diffsynth-2024"}), frozenset({SAFE, PICKLE}), "loads 0 modules"),
)  # fmt: skip


def verdicts(adapter: Adapter) -> list[Verdict]:
    """What every tool does with the file an adapter was read from. Empty when it was not read from a file."""
    source = adapter.source
    if source is None:
        return []
    judge = _on_modules if adapter.entries else _on_words
    return [judge(tool, adapter, source.dialect, source.container) for tool in TOOLS]


def _on_modules(tool: Tool, adapter: Adapter, dialect: str, container: str) -> Verdict:
    if container not in tool.containers:
        return Verdict(tool.name, "nothing", f"does not open {container} files")
    if dialect not in tool.dialects:
        return Verdict(tool.name, "nothing", tool.other)
    entries = list(adapter.entries.values())
    ignores: list[str] = []
    for rule in tool.rules:
        count = rule.count(entries)
        if count and rule.refuses:
            return Verdict(tool.name, "refuses", f"{rule.words} ({count} of {len(entries)} modules)")
        if count:
            ignores.append(f"{rule.words} ({count} of {len(entries)} modules)")
    if adapter.embeddings and not tool.bundles:
        ignores.append(f"the bundled words are not read: {', '.join(one.token for one in adapter.embeddings[:3])}")
    return Verdict(tool.name, "part" if ignores else "all", "", tuple(ignores))


def _on_words(tool: Tool, adapter: Adapter, form: str, container: str) -> Verdict:
    if not tool.forms:
        return Verdict(tool.name, "nothing", "reads no embeddings")
    if container == "picture":
        reads = tool.name.startswith("A1111")
        return Verdict(tool.name, "all" if reads else "nothing", "" if reads else "does not look into pictures")
    if container not in tool.containers:
        return Verdict(tool.name, "nothing", f"does not open {container} files")
    if form not in tool.forms:
        return Verdict(tool.name, "nothing", f"does not know the form {form}")
    if tool.one_token and len(adapter.embeddings) > 1:
        if tool.name == "diffusers":
            return Verdict(tool.name, "refuses", "takes one word a file")
        return Verdict(tool.name, "part", "", ("only the first word is read",))
    note = tool.forms[form]
    return Verdict(tool.name, "all", note)
