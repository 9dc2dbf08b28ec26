"""Which files of a folder are its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from persona.core.host.errors import UnreadableFile

PEFT_CONFIG = "adapter_config.json"
ENDINGS = (".safetensors", ".pdparams", ".bin", ".pt", ".pth", ".ckpt")
"""Endings that weight files have; inside a folder nothing else is opened."""
PEFT_MODEL = "adapter_model"
GROUPS: tuple[tuple[str, ...], ...] = (
    ("pytorch_lora_weights", "paddle_lora_weights", "mindspore_lora_weights"),
    ("adapter",),
)
"""Stems that other tools give an adapter, the first group that is there decides; of one stem the first ending is
taken."""
WORDS = ("learned_embeds", "learned_embeds_2")
"""Stems of new words; PEFT's folders have no other place for them."""
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def adapter_files(folder: Path) -> list[Path]:
    """The files that make up the adapter in a folder: PEFT's (one folder, or one for each component, and the words
    beside it), diffusers', ppdiffusers', a run's, or the only weight file there. Raises UnreadableFile when that is not
    decided."""
    if (folder / "model_index.json").is_file():
        raise UnreadableFile(
            f"{folder} is a whole model (diffusers), not an adapter.",
            hint=f"Use it as a base: persona train --base {folder}",
        )
    words = _called(folder, WORDS)
    if whole := _called(folder, (PEFT_MODEL,)):
        return whole + words
    for stems in GROUPS:
        if found := _called(folder, stems):
            return found[:1]
    parts = [folder / name for name in COMPONENTS if (folder / name / PEFT_CONFIG).is_file()]
    if parts:
        return [file for part in parts for file in adapter_files(part)] + words
    return words or [_only_one(folder)]


def is_one_folder(folder: Path) -> bool:
    """Whether a folder says by itself that it is one thing: PEFT's (whole or by component), or a whole model."""
    names = ("model_index.json", PEFT_CONFIG, *(f"{name}/{PEFT_CONFIG}" for name in COMPONENTS))
    return any((folder / name).is_file() for name in names)


def passed_over(folder: Path, chosen: list[Path]) -> list[str]:
    """Names of weight files beside the chosen ones, which a reading of the folder leaves out."""
    here = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS and path.is_file()]
    return [path.name for path in here if path not in chosen]


def weight_files(folder: Path) -> list[Path]:
    """Every weight file below a folder, sorted; hidden files and folders are passed over."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in ENDINGS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _called(folder: Path, stems: Sequence[str]) -> list[Path]:
    """The files of these stems, one of each."""
    found = [[path for ending in ENDINGS if (path := folder / f"{stem}{ending}").is_file()] for stem in stems]
    return [paths[0] for paths in found if paths]


def _only_one(folder: Path) -> Path:
    here = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS and path.is_file()]
    if len(here) == 1:
        return here[0]
    if not here:
        inside = sorted(path for path in folder.iterdir() if (path / PEFT_CONFIG).is_file())  # PEFT's, by adapter name
        hint = f"Name the one you mean: {inside[0]}" if inside else f"ls {folder}"
        raise UnreadableFile(f"{folder} holds no adapter: there is no weight file in it.", hint=hint)
    names = ", ".join(path.name for path in here[:4]) + (" …" if len(here) > 4 else "")
    raise UnreadableFile(
        f"{folder} holds {len(here)} weight files ({names}), and none is called as adapters are.",
        hint=f"Name the one you mean: {here[0]}",
    )
