"""CLIP as a judge: how like the references a picture is, and how well it shows what its prompt says.

The figures are CLIP-I and CLIP-T as DreamBooth's authors measured them (Ruiz et al. 2022, arXiv 2208.12242): cosines of
CLIP's vectors, of picture and reference (the mean over all references) and of picture and prompt. Any CLIP will do: a
folder that transformers' CLIPModel wrote, or a hub id. The embedded one is small and knows mini's world only; compare
figures of the same model with each other and nothing else. torch is imported when the first picture is judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persona.core.host.errors import BackendMissing, BaseModelError, UsageError
from persona.hub.bases import from_hub
from persona.hub.registry import packaged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    Pixels = NDArray[np.uint8]

EMBEDDED = "assets/judge"
"""The judge that comes with persona, trained on mini's pictograms (tools/judge)."""

SUBJECT, PROMPT = "subject_similarity", "prompt_fidelity"
BATCH = 32
OPENAI_MEAN, OPENAI_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""What CLIP's pictures are normalised with where a folder has no preprocessor_config.json (openai/CLIP, clip.py)."""


class Clip:
    """CLIP-I and CLIP-T; see the module's words. `notes` are what the user should know, each once."""

    name = "clip"
    summary = "CLIP: the same subject? what the prompt says?"
    figures: Mapping[str, str] = {
        SUBJECT: "mean cosine to the reference pictures (CLIP-I)",
        PROMPT: "cosine to the prompt (CLIP-T)",
    }

    def __init__(self, model: str = "", device: str = "auto") -> None:
        self.folder = _folder(model)
        self.device_name = device
        self.notes: list[str] = []
        self.config = _config(self.folder)

    def score(
        self, pictures: Sequence[Pixels], *, references: Sequence[Pixels] = (), prompts: Sequence[str] = ()
    ) -> dict[str, Vectors]:
        """See `Scorer.score`; cosines are -1 to 1."""
        if len(prompts) not in (0, len(pictures)):
            raise UsageError(f"There are {len(prompts)} prompts for {len(pictures)} pictures; each has one.")
        found: dict[str, Vectors] = {}
        if not len(references) and not any(prompts):
            return found
        seen = self.picture_vectors(pictures)
        if len(references):
            found[SUBJECT] = (seen @ self.picture_vectors(references).T).mean(1)
        if any(prompts):
            texts = sorted({prompt for prompt in prompts if prompt})
            row = {text: number for number, text in enumerate(texts)}
            read = self.text_vectors(texts)
            cosines = [seen[place] @ read[row[text]] if text else np.nan for place, text in enumerate(prompts)]
            found[PROMPT] = np.array(cosines, np.float32)
        return found

    def picture_vectors(self, pictures: Sequence[Pixels]) -> Vectors:
        """Unit vectors [n, d] of pictures, each [height, width, 3] uint8."""
        import torch

        model, device = self._opened
        found = []
        for first in range(0, len(pictures), BATCH):
            prepared = np.stack([self.prepared(picture) for picture in pictures[first : first + BATCH]])
            with torch.inference_mode():
                pooled = model.vision_model(pixel_values=torch.from_numpy(prepared).to(device)).pooler_output
                found.append(torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1).cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, int(self.config["projection_dim"])), np.float32)

    def text_vectors(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors [n, d] of texts; one that is longer than the model reads is cut, and noted."""
        import torch

        model, device = self._opened
        longest = model.config.text_config.max_position_embeddings
        found = []
        for first in range(0, len(texts), 4 * BATCH):
            part = list(texts[first : first + 4 * BATCH])
            self._note_cuts(part, longest)
            ids = self._tokenizer(part, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
            with torch.inference_mode():
                pooled = model.text_model(input_ids=ids.input_ids.to(device)).pooler_output
                found.append(torch.nn.functional.normalize(model.text_projection(pooled), dim=-1).cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, int(self.config["projection_dim"])), np.float32)

    def prepared(self, picture: Pixels) -> Vectors:
        """[3, side, side] as the model wants it: the shorter side resized (bicubic), the middle cut out, normalised."""
        from PIL import Image

        side, mean, deviation = self._preparation
        image = Image.fromarray(picture)
        scale = side / min(image.size)
        size = (max(side, int(image.width * scale)), max(side, int(image.height * scale)))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        values = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
        return ((values - mean) / deviation).transpose(2, 0, 1).astype(np.float32)

    @cached_property
    def _preparation(self) -> tuple[int, Vectors, Vectors]:
        """The model's side in pixels; mean and deviation of its channels."""
        file = self.folder / "preprocessor_config.json"
        told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        side = int((self.config.get("vision_config") or {}).get("image_size", 224))
        mean, deviation = told.get("image_mean", OPENAI_MEAN), told.get("image_std", OPENAI_DEVIATION)
        return side, np.asarray(mean, np.float32), np.asarray(deviation, np.float32)

    @cached_property
    def _opened(self) -> tuple[Any, Any]:
        """The model in fp32 and its device."""
        try:
            from persona.plugins.backends.torch.device import find_device
            from persona.plugins.backends.torch.libraries import quiet_imports

            with quiet_imports():
                import torch
                from safetensors import SafetensorError
                from transformers import CLIPModel
                from transformers.utils import logging
        except ImportError as error:
            raise BackendMissing(
                f"The scorer clip needs torch and transformers: {error}.",
                hint='Install them: pip install "persona[torch]"',
            ) from error
        device = find_device(self.device_name).name
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            opened: Any = CLIPModel.from_pretrained(
                self.folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise _refusal(self.folder, str(error).strip().splitlines()[0]) from error
        model, info = opened
        lacking = sorted(info["missing_keys"])
        if lacking:
            raise _refusal(self.folder, f"{len(lacking)} weights are missing, the first is {lacking[0]}")
        return model.to(device).eval(), device

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        try:
            return CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise _refusal(self.folder, "its tokenizer cannot be read") from error

    def _note_cuts(self, texts: Sequence[str], longest: int) -> None:
        for text, ids in zip(texts, self._tokenizer(list(texts)).input_ids, strict=True):
            if len(ids) > longest:
                line = f'the judge reads {longest} tokens; the rest of "{text[:40]}…" is not judged'
                if line not in self.notes:
                    self.notes.append(line)


def _folder(model: str) -> Path:
    """The folder of a CLIP: the embedded one, a path, or a hub id's local copy."""
    if not model:
        return packaged(EMBEDDED)
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        try:
            return from_hub(model)
        except BaseModelError as error:
            raise BaseModelError(
                f"The judge {model} is no folder here and could not be fetched from the hub: "
                f"{error.message.rpartition('hub: ')[2]}",
                hint="Leave --model out to use the embedded one",
            ) from error
    raise BaseModelError(
        f"There is no judge {model}: no such folder.", hint="Leave --model out to use the embedded one"
    )


def _config(folder: Path) -> Mapping[str, Any]:
    """config.json of a CLIP. Raises BaseModelError for a folder that holds none."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _refusal(folder, "it has no config.json that can be read") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "clip":
        raise _refusal(folder, f"its config.json says {kind or 'nothing'}, not clip")
    if not any(folder.glob("*.safetensors")):
        raise _refusal(folder, "it has no .safetensors file, and no pickle is opened")
    return dict(config)


def _refusal(folder: Path, reason: str) -> BaseModelError:
    return BaseModelError(
        f"{folder} is not a CLIP that can judge: {reason}.",
        hint="Give a folder that CLIPModel.save_pretrained wrote, or leave --model out",
    )
