"""Makes `mini` from nothing: tokenizer, autoencoder, latents, denoiser, model folder.

Run it again with the same --work to go on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from . import autoencoder, decoder, denoiser
from .export import export
from .latents import make_latents
from .measure import Measured, measure
from .model_card import Figures
from .pictures import FONT_PATH, Glyph, load_glyphs, vocabulary
from .processes import join, wait
from .tokenizer import Tokenizer, make_tokenizer


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.mini.make", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the unfinished parts; the same one resumes")
    parser.add_argument("--autoencoder", type=Path, help="a trained autoencoder's folder, instead of training one")
    parser.add_argument("--autoencoder-minutes", type=float, default=100, help="training time over all runs")
    parser.add_argument(
        "--decoder-minutes", type=float, default=46, help="processor time for its decoder alone, after that"
    )
    parser.add_argument("--denoiser-minutes", type=float, default=100, help="training time over all runs")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="of the denoiser, at the cosine's top")
    parser.add_argument("--out", type=Path, default=Path("persona/assets/mini"), help="the model folder to write")
    parser.add_argument(
        "--export-only", action="store_true", help="export what training has reached; it may be going on"
    )
    parser.add_argument(
        "--no-measure", action="store_true", help="leave the model card's results empty (saves minutes)"
    )
    parser.add_argument("--machine", default="an unnamed machine", help="for the model card: what it was trained on")
    parser.add_argument("--note", default="", help="for the model card: what was special about this training")
    parser.add_argument("--font", type=Path, default=FONT_PATH)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="train the denoiser without torch.compile")
    return parser.parse_args()


def make_autoencoder(options: argparse.Namespace, glyphs: tuple[Glyph, ...]) -> Path:
    """The given autoencoder's folder, or the one trained here, its decoder last and alone."""
    if options.autoencoder:
        return Path(options.autoencoder)
    trained = Path(options.work) / "vae"
    if not (trained / "config.json").exists():  # delete the folder to train on with a larger budget
        training = autoencoder.Training(seconds=60 * options.autoencoder_minutes)
        autoencoder.train(options.work, training, glyphs, options.device)
    refined = Path(options.work) / "decoder" / "vae"
    if not (refined / "config.json").exists():
        training = autoencoder.Training(seconds=60 * options.decoder_minutes, learning_rate=1e-3)
        decoder.refine(trained, refined.parent, training, glyphs, options.device)
    return refined


def write_model(options: argparse.Namespace, vae: Path, glyphs: tuple[Glyph, ...], tokenizer: Tokenizer) -> None:
    """Exports, measures the exported folder, and writes it again with the figures in its card."""
    state_file = options.work / "denoiser.pt"
    state = torch.load(state_file, map_location="cpu", weights_only=True)
    latents = make_latents(options.work / "latents.npz", AutoencoderKL.from_pretrained(vae), glyphs)
    figures = Figures(
        glyphs=len(glyphs),
        tokens=len(tokenizer.ids),
        latents=len(latents.values),
        steps=state["step"],
        seconds=state["elapsed"],
        machine=options.machine,
        note=options.note,
        finished=state["elapsed"] >= 60 * options.denoiser_minutes,
    )
    export(state_file, vae, tokenizer, options.out, figures)
    if options.no_measure:
        return
    measured: Measured = measure(options.out, device=options.device, font=options.font)
    print(json.dumps({"steps": state["step"], **asdict(measured)}, indent=2), flush=True)
    export(state_file, vae, tokenizer, options.out, replace(figures, measured=measured))


def main() -> None:
    """The stages in order; each goes on where it stopped, and one that is done takes no time."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    rank, _ = join(options.device)
    glyphs = load_glyphs(options.font)
    tokenizer = make_tokenizer(vocabulary(glyphs))
    if rank > 0:
        wait()  # until the first process has the autoencoder and the latents
    vae = make_autoencoder(options, glyphs)
    if not options.export_only:
        model = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).to(options.device).eval()
        latents = make_latents(options.work / "latents.npz", model, glyphs)
        if rank == 0:
            print(f"{len(glyphs)} glyphs, {len(tokenizer.ids)} tokens, {len(latents.values)} latents", flush=True)
            wait()
        training = denoiser.Training(
            seconds=60 * options.denoiser_minutes,
            learning_rate=options.learning_rate,
            compiled=not options.no_compile,
        )
        denoiser.train(options.work, training, latents, glyphs, tokenizer, options.device)
    if rank == 0:
        write_model(options, vae, glyphs, tokenizer)


if __name__ == "__main__":
    main()
