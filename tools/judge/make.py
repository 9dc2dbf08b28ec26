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

FINISH = Training(seconds=0, calm=0.6)
RESTART = Training(seconds=0, calm=0.6, learning_rate=7e-4, named=28, unnamed=4, decoded_share=0.5)
"""How the picture encoder is trained on alone, first and when its learning rate rises again."""


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.judge.make", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the unfinished parts; the same one resumes")
    parser.add_argument(
        "--autoencoder", type=Path, default=Path("persona/assets/mini/vae"), help="whose blur the judge has to forgive"
    )
    parser.add_argument("--minutes", type=float, default=16, help="processor time for both encoders, over all runs")
    parser.add_argument(
        "--finish-minutes", type=float, default=14, help="processor time for the picture encoder alone, after that"
    )
    parser.add_argument(
        "--restart-minutes",
        type=float,
        nargs="*",
        default=[10, 62],
        help="and for it once more, each time with a learning rate that rises again and falls as a cosine",
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


def stages(options: argparse.Namespace) -> dict[Path, float]:
    """The states of the picture encoder's trainings, in order, each with its minutes."""
    minutes = [options.finish_minutes, *options.restart_minutes]
    return {options.work / f"finish-{number}.pt": each for number, each in enumerate(minutes)}


def write_judge(options: argparse.Namespace, glyphs: tuple[Glyph, ...], tokenizer: Tokenizer) -> None:
    """Exports, measures the exported folder, and writes it again with the figures in its card."""
    files = [file for file in stages(options) if file.exists()]
    states = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
    state_file, state = files[-1], states[-1]
    figures = Figures(
        glyphs=len(glyphs),
        tokens=len(tokenizer.ids),
        parameters=sum(value.numel() for value in state["average"].values()),
        steps=states[0]["steps_together"],
        seconds=states[0]["elapsed_together"],
        finishing_steps=states[0]["step"],
        finishing_seconds=states[0]["elapsed"],
        restarts=tuple((each["step"], each["elapsed"]) for each in states[1:]),
        machine=options.machine,
        note=options.note,
        finished=len(files) == len(stages(options)) and state["elapsed"] >= 60 * stages(options)[state_file],
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
        reached = train(options.work, Training(seconds=60 * options.minutes), glyphs, decoded, tokenizer)
        for number, (file, minutes) in enumerate(stages(options).items()):
            training = replace(RESTART if number else FINISH, seconds=60 * minutes)
            reached = finish(reached, file, training, glyphs, decoded, tokenizer)
    write_judge(options, glyphs, tokenizer)


if __name__ == "__main__":
    main()
