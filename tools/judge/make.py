"""Makes the judge from nothing but the emoji font and mini's autoencoder; `--work` keeps every stage, so that the same
command goes on after a stop.

    python -m tools.judge.make --work build/judge
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tools.mini.pictures import FONT_PATH, Glyph, load_glyphs, vocabulary
from tools.mini.tokenizer import Tokenizer, make_tokenizer

from .export import export
from .finishing import finish
from .measure import measure
from .model_card import Figures
from .training import Training, train
from .views import make_decoded


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.judge.make", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the unfinished parts; the same one resumes")
    parser.add_argument(
        "--autoencoder", type=Path, default=Path("persona/assets/mini/vae"), help="whose blur the judge has to forgive"
    )
    parser.add_argument("--minutes", type=float, default=16, help="processor time for both encoders, over all runs")
    parser.add_argument(
        "--finish-minutes", type=float, default=24, help="processor time for the picture encoder alone, after that"
    )
    parser.add_argument("--out", type=Path, default=Path("persona/assets/judge"), help="the model folder to write")
    parser.add_argument(
        "--export-only", action="store_true", help="export what training has reached; it may be going on"
    )
    parser.add_argument("--no-measure", action="store_true", help="leave the model card's results empty")
    parser.add_argument("--machine", default="an unnamed machine", help="for the model card: what it was trained on")
    parser.add_argument("--note", default="", help="for the model card: what was special about this training")
    parser.add_argument("--font", type=Path, default=FONT_PATH)
    return parser.parse_args()


def write_judge(options: argparse.Namespace, glyphs: tuple[Glyph, ...], tokenizer: Tokenizer) -> None:
    """Exports, measures the exported folder, and writes it again with the figures in its card."""
    state_file = options.work / "judge.pt"
    state = torch.load(state_file, map_location="cpu", weights_only=True)
    figures = Figures(
        glyphs=len(glyphs),
        tokens=len(tokenizer.ids),
        parameters=sum(value.numel() for value in state["average"].values()),
        steps=state["steps_together"],
        seconds=state["elapsed_together"],
        finishing_steps=state["step"],
        finishing_seconds=state["elapsed"],
        machine=options.machine,
        note=options.note,
        finished=state["elapsed"] >= 60 * options.finish_minutes,
    )
    export(state_file, tokenizer, options.out, figures)
    if options.no_measure:
        return
    measured = measure(options.out, options.autoencoder, font=options.font)
    print(json.dumps({"steps": state["step"], **asdict(measured)}, indent=2), flush=True)
    export(state_file, tokenizer, options.out, replace(figures, measured=measured))


def main() -> None:
    """The stages in order; each goes on where it stopped, and one that is done takes no time."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    glyphs = load_glyphs(options.font)
    tokenizer = make_tokenizer(vocabulary(glyphs))
    if not options.export_only:
        decoded = make_decoded(options.work / "decoded.npz", options.autoencoder, glyphs)
        print(
            f"{len(glyphs)} glyphs, {len(tokenizer.ids)} tokens, {len(decoded.pictures)} decoded pictures", flush=True
        )
        together = train(options.work, Training(seconds=60 * options.minutes), glyphs, decoded, tokenizer)
        finishing = Training(seconds=60 * options.finish_minutes, calm=0.6)
        finish(together, options.work / "judge.pt", finishing, glyphs, decoded, tokenizer)
    write_judge(options, glyphs, tokenizer)


if __name__ == "__main__":
    main()
