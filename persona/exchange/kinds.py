"""What a file looks like that is no adapter, in words, for errors and for `persona inspect` (dialects.md §1.2,
§11.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from persona.core.host.contracts import State

Test = Callable[[frozenset[str]], bool]


def _begins(*prefixes: str) -> Test:
    return lambda keys: any(key.startswith(prefixes) for key in keys)


def _ends(*suffixes: str) -> Test:
    return lambda keys: any(key.endswith(suffixes) for key in keys)


def _has(*parts: str) -> Test:
    return lambda keys: any(part in key for key in keys for part in parts)


KINDS: tuple[tuple[str, Test, str], ...] = (
    ("controlnet-lllite", _begins("lllite_unet"), "a ControlNet-LLLite"),
    ("control-lora", lambda keys: "lora_controlnet" in keys, "a Control-LoRA (a ControlNet, not an adapter)"),
    ("custom-diffusion", _has("custom_diffusion"), "Custom Diffusion weights"),
    (
        "hypernetwork",
        lambda keys: (
            bool({"layer_structure", "activation_func"} & keys)
            or any(key.split(".")[0] in ("320", "640", "768", "1024", "1280") for key in keys)
        ),
        "an A1111 hypernetwork",
    ),
    ("xti", lambda keys: "IN01" in keys and "OUT11" in keys, "kohya XTI (one embedding for every layer)"),
    ("optimizer", _begins("optimizer", "state.0.exp_avg", "moment1."), "an optimizer's state"),
    (
        "checkpoint",
        _begins("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner."),
        "a whole model (single file)",
    ),
    (
        "adapter-parts",
        _ends(".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".lora_down.weight"),
        "a LoRA of a model that persona does not know",
    ),
    ("flux", _begins("double_blocks.", "single_blocks."), "a whole Flux transformer"),
    ("sd3", _begins("joint_blocks."), "a whole Stable Diffusion 3 transformer"),
    ("vae", _begins("decoder.up_blocks.", "encoder.down_blocks."), "a whole VAE"),
    ("unet", _begins("down_blocks.", "up_blocks.", "mid_block."), "a whole UNet or ControlNet"),
    ("text-encoder", _begins("text_model.", "encoder.layers.", "embeddings."), "a whole text encoder"),
    ("transformer", _begins("transformer_blocks.", "single_transformer_blocks."), "a whole transformer"),
)
"""(name, test of the keys, words); the first that holds."""


def kind_of(keys: Iterable[str]) -> tuple[str, str]:
    """(name, words) of what a set of keys looks like."""
    found = frozenset(keys)
    return next(((name, words) for name, test, words in KINDS if test(found)), ("state", "a set of named tensors"))


def looks_like(state: State) -> str:
    """The words for a state; they go after "is"."""
    return kind_of(state.tensors)[1]
