"""Write docs/formats.md: file formats, dialects, forms of embeddings and of whole models, from the tables in the code.

python -m tools.docs.formats_reference            write it
python -m tools.docs.formats_reference --check    say whether it is as it would be written, exit 1 if not"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.adapters.entry import Adapter, Entry, Scale
from persona.core.adapters.slots import Slots
from persona.core.adapters.tensor import in_memory
from persona.core.host.errors import PersonaError

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
FLUX = "single_transformer_blocks.0.proj_out"
MEASURED = """## Where real files say otherwise

Descriptions of these formats contradict files that the programs themselves wrote (`tests/fixtures`). The files win:

| often said | what the files say |
|---|---|
| an encrypted MindSpore checkpoint has no mark of its own | AES-GCM files of MindSpore 2.7 begin with `d8 5e 3a 7f`; they are refused by that name |
| the header's `format` tells Paddle's layout from torch's | text_to_image of ppdiffusers writes `pt` over Paddle's layout, PaddleNLP `np`, `paddle.save(safetensors=True)` nothing: the shapes decide |
| mindpet's keys end in `_A` and `_B` | the parameters are called so; the files have `mindpet_delta_lora_a` and `_b` |
| mindone.diffusers keeps alpha as diffusers does | 0.3 writes none and looks for none in a header; 0.5 does both |
| CLIP's names begin with `text_model.` | transformers 5.6 and later leave it out, and older readers then draw random weights without an error: it is read either way and always written; a PEFT folder for CLIPTextModel gets both spellings, because PEFT passes over the one its model does not have |
| PEFT's LoHa and LoKr apply alpha / rank as LyCORIS does | they do; it is LyCORIS' own merge that applies it twice (4.1.3) |
| OFT is OFT | LyCORIS and sd-scripts turn the outputs of a layer, PEFT the inputs: PEFT's OFT and BOFT folders are rewritten, or merged into a base, with the base's weights (`--base`), and LyCORIS' are carried to LyCORIS' dialects as they are |
| PEFT's OFT of a convolution is what it merges | for kernels over 1x1 its run and its merge differ by as much as the weight (0.21): refused, as is what `use_cayley_neumann` meant before 0.18 |

The consumers' own loaders were asked as well: `make test-peers`.
"""  # noqa: E501 - the rows of a table

READ_ONLY = {
    "xlabs": "`double_blocks.0.processor.qkv_lora1.down.weight`",
    "cloneofsimo": "(a list: up, down, up, down, …)",
}
HEAD = """# Formats

A file is read in two steps: its *file format* (container) turns bytes into named tensors, its *dialect* turns names
into meaning. Any dialect can be read from any file format that holds it. Both are told apart by what is in the file,
never by its ending: `persona inspect FILE` says what was found, and which tools will load it.

```sh
persona convert learned_embeds.pdparams cat.safetensors
persona convert lora.safetensors for-a1111.safetensors --to kohya
persona convert *.pdparams --to kohya --out-dir converted
```

This page is written by `python -m tools.docs.formats_reference` from the tables that do the work; a test compares.
[matrix.md](matrix.md) has the cost of every move, measured.
"""
DEFAULTS = """## What is written when nothing is said

| ending of OUT | file format | adapter | embedding | whole model |
|---|---|---|---|---|
| `.safetensors` | safetensors | diffusers | diffusers (two encoders: clip-pair) | ldm |
| `.bin`, `.pt` | torch | diffusers | diffusers | ldm |
| `.pdparams` | Paddle | ppdiffusers | ppdiffusers | ppdiffusers |
| `.ckpt` | MindSpore | mindone | diffusers | mindspore |
| none, or `/` | a folder | peft (with `--to peft`) | | diffusers |

The chosen dialect is told; `--to` names another. Other names are understood: a1111, forge, sd-scripts (kohya), comfyui
(comfy), paddle (ppdiffusers), mindspore (mindone), wukong (mindpet).
"""
MODELS = """## Whole models

| form | what | models |
|---|---|---|
| **diffusers** | a folder of components, or one component in a file | all |
| **ldm** | one file in the authors' own names | Stable Diffusion 1, 2, XL and its refiner: UNet, autoencoder, text encoders |
| | | Stable Diffusion 3 and 3.5, Flux.1: the transformer alone, or with all the others as ComfyUI packs them |
| | | an autoencoder alone |
| **ppdiffusers** | a folder of Paddle's components | all |
| **mindspore**, **wukong** | one checkpoint of MindONE's or Wukong's code | those with a UNet |

Names and layout change, no number does. A transformer and an autoencoder have to be whole: every parameter that a model
of their sizes has, in its shape, and no other. So these are refused, each by the name of the first thing that is wrong:
weights in scaled float8 or four bits, which have scales beside them; Flux.2, Chroma and other relatives of Flux.1;
autoencoders of another making; text encoders that are packed otherwise than SD3's and Flux' are.
"""  # noqa: E501 - the rows of a table
WORDS = """Most forms have marks of their own. diffusers' has none: a key, which is the word, and its vectors. Such a
file is read as words when they are in angle brackets (`<cat>`), when the file is called `learned_embeds…`, or when
there are at most 75 vectors as wide as a text encoder (768, 1024, 1280, 4096; 192 in mini) under a plain name. The last
cannot be sure, as any tensor of that shape looks the same, and is told in a note. Everything else is refused, and what
it might be is said.
"""
ALPHA = """## Alpha

What a LoRA adds is alpha / rank · up · down, and most trouble between tools is a lost alpha. persona prints where it
came from: beside the module, in the header, in adapter_config.json, told (`--alpha`), or assumed (alpha = rank, as
every reader does that finds none). `--alpha` fills what is absent; against a file that has alphas it is refused unless
`--override-alpha` is given. A dialect with no place for alpha gets it multiplied into the factors, with one rounding,
and none at all when alpha / rank is a power of two.

## Leftovers

A key that no rule explains is an error that names it; `--allow-leftovers` leaves it behind and lists it. A module that
the target cannot hold is an error too; `--drop` leaves such modules out and lists them. Optimizer states and step
counters are bookkeeping: dropped, and reported.

## Text in the header

safetensors files carry text. It goes along under its own names, except what is private (`ss_dataset_dirs`,
`ss_datasets`, `ss_tag_frequency`, `ss_reg_dataset_dirs`, `ot_config`: folders and captions of the person who trained)
and what is no longer true of the new file (hashes, format). Whatever stays behind is named. Other file formats have no
place for text.

## Certificate

`--certificate FILE.json` reads the written files back and compares every ΔW with the source's; it holds the relative
error of each module, where each alpha came from, what is missing, and the sha256 of inputs, outputs and tensors.
"""


def example_entry(name: str) -> Adapter:
    """One module: an SD1 attention projection, or Flux' where a dialect knows transformers alone."""

    def lora(component: str, path: str) -> Entry:
        factors = {"down": in_memory(np.ones((2, 4), np.float32)), "up": in_memory(np.ones((4, 2), np.float32))}
        return Entry(component, path, "lora", factors, Scale(1.0, 2, "rank", "told"), kernel=())

    family = "sdxl" if name in ("mindone-sdxl", "diffsynth-2024") else "sd1"
    entry = lora("unet", QUERY)
    return Adapter(family, {("unet", entry.path): entry}, families=frozenset({family}))


def example_key(name: str, dialect: Any) -> str:
    """The first key of a file in this dialect that holds `example_entry`."""
    if name in READ_ONLY:
        return READ_ONLY[name]
    try:
        outputs = dialect.write(example_entry(name))
    except PersonaError:
        return ""
    return f"`{next(key for output in outputs for key in output.tensors)}`"


def holds(slots: Slots) -> str:
    """What has a place, in words."""
    parts = ["LoRA"]
    parts += ["any convolution"] if slots.convolution and not slots.linear_only else []
    parts += ["Tucker"] if slots.tucker else []
    others = sorted(slots.algorithms - {"lora"})
    parts += [", ".join(others)] if others else []
    parts += [f"DoRA ({' and '.join(sorted(slots.magnitude, reverse=True))}put axis)"] if slots.magnitude else []
    parts += ["trained biases"] if slots.bias else []
    parts += ["words in the same file"] if slots.embeddings == "bundle" else []
    return "; ".join(parts)


def loses(slots: Slots) -> str:
    """What has no place, and what happens to it."""
    folded = {"none": "alpha: folded into the factors", "header": "alpha outside safetensors: folded"}
    parts = [folded[slots.alpha]] if slots.alpha in folded else []
    parts += [] if slots.tucker else ["Tucker: multiplied out"]
    parts += [] if slots.algorithms - {"lora"} else ["LoHa, LoKr: as LoRA of a higher rank"]
    parts += ["several methods, or LoKr divided in several ways: as LoRA", "OFT, BOFT: refused"] if slots.folder else []
    missing = {"out", "in"} - slots.magnitude
    if missing == {"out", "in"}:
        parts.append("DoRA: needs the base model")
    elif missing:
        parts.append("DoRA along the input: needs the base model")
    parts += ["DoRA beside plain LoRA: needs the base model"] if slots.magnitude_on_all else []
    parts += ["modules outside attention: refused"] if slots.attention_only else []
    parts += [f"components other than {', '.join(sorted(slots.components))}: refused"] if slots.components else []
    parts += [f"models other than {', '.join(sorted(slots.families))}: refused"] if slots.families else []
    parts += ["words: in a file beside it"] if slots.embeddings == "beside" else []
    return "; ".join(parts)


def alpha_place(slots: Slots) -> str:
    """Where alpha is kept."""
    words = {"module": "beside each module", "header": "header", "config": "adapter_config.json", "none": "nowhere"}
    return words[slots.alpha]


def dialect_rows() -> Iterator[str]:
    """A line of the table for every dialect."""
    from persona.api import host

    for name, descriptor in host().provided("dialect").items():
        dialect = host().load("dialect", name)
        written = getattr(dialect, "names", True) is not None and name not in READ_ONLY
        formats = ", ".join(dialect.slots.containers) if not dialect.slots.folder else "a folder"
        holding = holds(dialect.slots) if written else "read only"
        losing = loses(dialect.slots) if written else ""
        cells = [
            f"**{name}**",
            descriptor.summary.replace(" (read)", ""),
            example_key(name, dialect),
            alpha_place(dialect.slots),
            formats,
            holding,
            losing,
        ]
        yield "| " + " | ".join(cells) + " |"


def container_rows() -> Iterator[str]:
    """A line for every file format."""
    from persona.api import host

    for name, descriptor in host().provided("container").items():
        endings = " ".join(f"`{suffix}`" for suffix in descriptor.suffixes) or "read only"
        yield f"| {name} | {descriptor.summary} | {endings} |"


def embedding_rows() -> Iterator[str]:
    """A line for every form of embeddings."""
    from persona.formats.dialects.embeddings.forms import FORMS

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    for form in FORMS:
        cells = [
            f"**{form.name}**" + ("" if form.writable else " (read only)"),
            form.written_by,
            "`" + form.example.replace("|", "or") + "`",
            yes(form.several_tokens),
            yes(form.several_encoders),
            yes(form.keeps_token),
            " ".join(f"`{suffix}`" for suffix in form.suffixes),
        ]
        yield "| " + " | ".join(cells) + " |"


def tool_rows() -> Iterator[str]:
    """A line for every tool: what it opens, and what it ignores."""
    from persona.exchange.consumers import TOOLS

    for tool in TOOLS:
        rules = "; ".join(rule.words for rule in tool.rules)
        opens = ", ".join(sorted(tool.dialects))
        forms = ", ".join(tool.forms) or "none"
        yield f"| {tool.name} | {opens} | {', '.join(sorted(tool.containers))} | {forms} | {rules} |"


def family_rows() -> Iterator[str]:
    """A line for every family."""
    from persona.formats.models.families import FAMILIES

    for name, family in FAMILIES.items():
        yield f"| {name} | {family.title} | {', '.join(family.components)} |"


def page() -> str:
    """The whole page, without what is installed on this machine beside persona."""
    os.environ["PERSONA_PLUGINS"] = ""
    tables: Mapping[str, tuple[str, Iterator[str]]] = {
        "## File formats\n": ("| name | what | written as |", container_rows()),
        "## Dialects of adapters\n": (
            "| dialect | where it comes from | example key | alpha | file formats | can hold | "
            "lost or changed going there |",
            dialect_rows(),
        ),
        f"## Embeddings (textual inversion)\n\n{WORDS}": (
            "| form | written by | example key | several words | several encoders | keeps the word | endings |",
            embedding_rows(),
        ),
        "## Base models\n": ("| family | name | components |", family_rows()),
        "## Who loads what\n\n`persona inspect` tells this of your file.\n": (
            "| tool | dialects | file formats | embeddings | what it ignores or refuses |",
            tool_rows(),
        ),
    }
    sections = [HEAD, DEFAULTS]
    for heading, (header, rows) in tables.items():
        line = "|" + "---|" * (header.count("|") - 1)
        sections.append("\n".join([heading, header, line, *rows, ""]))
    return "\n".join([*sections, MODELS, ALPHA, MEASURED])


def main() -> int:
    """Write, or check with --check."""
    text = page()
    if "--check" in sys.argv[1:]:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print("docs/formats.md is as it would be written" if same else "docs/formats.md is old: make docs")
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
