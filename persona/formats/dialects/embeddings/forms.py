"""The spellings of textual inversion as data (dialects.md §6.2), and the tests that tell them apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from persona.core.adapters.tensor import TensorRef
from persona.formats.models.families import FAMILIES


@dataclass(frozen=True)
class Form:
    """One spelling: who writes it, an example key, and what a file of it can hold."""

    name: str
    written_by: str
    example: str
    several_tokens: bool
    several_encoders: bool
    keeps_token: bool
    suffixes: tuple[str, ...]
    writable: bool = True


_SAFE = (".safetensors",)
FORMS: tuple[Form, ...] = (
    #    name, written by, example key, several tokens, several encoders, keeps the token, suffixes
    Form("diffusers", "diffusers, mindone, .ti.pt", "<cat>", True, False, True, (*_SAFE, ".bin", ".pt", ".ckpt")),
    Form("ppdiffusers", "ppdiffusers", "<cat>", True, False, True, (".pdparams",)),
    Form("kohya", "sd-scripts, A1111, ai-toolkit", "emb_params | clip_l + clip_g", False, True, False, (*_SAFE, ".pt")),
    Form("clip-pair", "diffusers advanced DreamBooth", "clip_l + clip_g (+ t5)", False, True, False, _SAFE),
    Form("a1111", "A1111, CompVis", "string_to_param.*", False, False, True, (".pt", ".bin")),
    Form("mindone-ti", "MindONE examples", "….embedding_table", False, False, True, (".ckpt",)),
    Form("bundle", "kohya, inside a LoRA", "bundle_emb.cat.emb_params", True, True, True, _SAFE),
    Form("onetrainer", "OneTrainer", "emp_params", False, True, False, _SAFE, writable=False),
    Form("safeloras", "cloneofsimo/lora", "<cat>, <embed> in the header", True, False, True, _SAFE, writable=False),
)
BY_NAME: Mapping[str, Form] = {form.name: form for form in FORMS}

# the key that names an encoder -> diffusers' component; t5 is the third encoder beside clip_g (SD3), else the second
ENCODER_KEYS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}
SD12_KEYS = {"emb_params": "text_encoder", "emp_params": "text_encoder"}  # emp: OneTrainer's own misspelling
OUTPUT_SUFFIX = "_out"  # OneTrainer's output embeddings; no other tool has a place for them
A1111_PARAMS, A1111_TOKENS = "string_to_param", "string_to_token"
A1111_TEXTS = ("name", "sd_checkpoint", "sd_checkpoint_name")
A1111_ANY_TOKEN = "*"
BUNDLE_PREFIX = "bundle_emb."
EMBED_MARK = "<embed>"
MINDONE_TOKEN, MINDONE_COUNT, MINDONE_TABLE = "placeholder_token", "num_vectors", "embedding_table"
MINDONE_SD = "cond_stage_model.transformer.embedding_table"

# kohya's XTI: one embedding for each layer of the UNet (dialects.md §1.2 K5)
XTI_KEYS = frozenset({"MID", *(f"IN{n:02}" for n in (1, 2, 4, 5, 7, 8)), *(f"OUT{n:02}" for n in range(3, 12))})

MINI_WIDTH = 192  # persona/assets/mini/text_encoder
LEARNED = "learned_embeds"  # how diffusers, ppdiffusers and mindone call the file
CLIP_G_WIDTH = 1280  # no other encoder of the families persona knows is that wide
MOST_TOKENS = 64
MOST_VECTORS = 75  # of one token: what one prompt holds
_PARAMETER = re.compile(
    r"(^|\.)(weight|bias|gamma|beta|alpha|dora_scale|diff|diff_b|w_norm|b_norm|on_input|embedding_table|"
    r"position_embedding|running_mean|running_var|_mean|_variance|moving_mean|moving_variance|"
    r"(hada|lokr|ia3|oft|boft)_[a-z0-9_]+|lora_[a-zA-Z_]+|mindpet_\w+|tk_delta_\w+)$"
)
_PATH = re.compile(r"[\s./:]")
_BOOKKEEPING = {"step", "global_step", "epoch", "epoch_num", "step_num", "learning_rate"}


def looks_like_a_token(key: str) -> bool:
    """Whether a key can be a placeholder word; a parameter's path is not one."""
    return bool(key) and not _PARAMETER.search(key) and ".lora" not in key and key not in _BOOKKEEPING


def is_marked(key: str) -> bool:
    """Whether a key is a placeholder as nearly everybody writes one, in angle brackets."""
    return key.startswith("<") and key.endswith(">") and len(key) > 2


def is_encoders_width(width: int) -> bool:
    """Whether the text encoder of some family is that wide, or that of mini."""
    encoders = (
        config
        for family in FAMILIES.values()
        for component, configs in family.components.items()
        if component.startswith("text_encoder")
        for config in configs
    )
    return width == MINI_WIDTH or any(getattr(config, "width", 0) == width for config in encoders)


def is_plausible_word(key: str, ref: TensorRef) -> bool:
    """Whether a tensor that nothing marks can be a word: a name without the dots, spaces and slashes of a parameter's,
    an encoder's width, no more vectors than a prompt holds. Any other tensor of such a shape passes too, so that the
    reader says what it took it for."""
    few = len(ref.shape) == 1 or ref.shape[0] <= MOST_VECTORS
    return not _PATH.search(key) and few and is_encoders_width(ref.shape[-1])


def is_vectors(ref: TensorRef) -> bool:
    """Whether a tensor can be one embedding: numbers with a fraction, [dim] or [n, dim]."""
    return ref.python is None and ref.dtype.kind in "fV" and len(ref.shape) in (1, 2) and 0 not in ref.shape


def same_width(refs: Iterable[TensorRef]) -> bool:
    """Whether all belong to encoders of one width."""
    return len({ref.shape[-1] for ref in refs}) == 1
