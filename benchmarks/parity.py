"""The same recipe and seed on every backend that is here: does the same model come out?

    python benchmarks/parity.py                                  lora on mini, 50 steps, every backend, one sheet
    python benchmarks/parity.py --method full --steps 20         another method; all: the four, one sheet under another
    python benchmarks/parity.py --python paddle=PATH             the Python of an environment that persona did not make
    python benchmarks/parity.py --travel                         also: each product converted, and drawn by the others
    python benchmarks/parity.py --control                        also: the first backend against itself on two threads

Each backend has a process of its own. The first one of the list is what the others are compared with: the loss of each
step, what was trained (ΔW of each component, relative Frobenius norm; whole weights as their difference from the base;
CLIP's k_proj.bias is left out, whose true gradient is zero, so that it holds rounding only), and a picture drawn with
DDIM (PSNR). Sums that are added up in another order round otherwise, and training makes such differences grow, the
faster the higher the learning rate: --control shows how much that is without any other framework. The base is mini,
the pictures are persona's example, everything in fp32 on the CPU. Exit code 1 when something is beyond its target."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # persona, where it is not installed

BACKENDS = ("torch", "paddle", "mindspore")
NATIVE = {
    "torch": ("diffusers", ".safetensors"),
    "paddle": ("ppdiffusers", ".pdparams"),
    "mindspore": ("mindone", ".ckpt"),
}
LOSS, WEIGHTS, DECIBELS = 1e-4, 1e-3, 40.0  # what is aimed at
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"train_text_encoder": True, "learning_rate": 1e-3},
    "full": {"train_text_encoder": True, "learning_rate": 1e-4},
    "dreambooth": {"token": "sks", "class_word": "robot", "class_pictures": 8, "learning_rate": 1e-4},
    "textual-inversion": {"placeholder": ("<toy>",), "initializer": ("robot",), "replaces": ("sks robot",),
                          "vectors": 2, "learning_rate": 5e-3},
}  # fmt: skip
PROMPTS = {"textual-inversion": "<toy> on a green background"}
PROMPT = "a sks robot on a green background"


@dataclass
class Made:
    """What one backend made."""

    backend: str
    losses: np.ndarray
    changes: dict[str, dict[str, np.ndarray]]  # by component and module
    picture: np.ndarray
    product: Path
    base: str  # the hash of the base it was trained on


def train(backend: str, method: str, steps: int, seed: int, folder: Path) -> None:
    """Train and draw, in this process; the run goes to folder/run, the picture to folder/picture.png."""
    import persona

    data = ROOT / "persona" / "assets" / "subjects" / "robot"
    run = persona.train(
        method, data, base="mini", backend=backend, device="cpu", steps=steps, seed=seed, batch=2, save_every=0,
        samples=False, output=str(folder / "run"), **RECIPES[method],
    )  # fmt: skip
    assert run.product is not None
    (folder / "product.txt").write_text(str(run.product), encoding="utf-8")
    draw(backend, run.product, PROMPTS.get(method, PROMPT), folder / "picture.png")


def draw(backend: str, product: Path, prompt: str, target: Path) -> None:
    """One picture with DDIM, from an adapter file or a folder of whole weights."""
    import persona

    whole = product.is_dir()
    (picture,) = persona.generate(
        prompt, base=product if whole else "mini", adapters=() if whole else (product,), seed=3, steps=20,
        guidance_scale=4.0, sampler="ddim", backend=backend, device="cpu",
    )  # fmt: skip
    picture.save(target)


def alone(*words: object, threads: int = 1) -> str:
    """This script in a process of its own; what was wrong, "" when nothing was."""
    done = subprocess.run(
        [sys.executable, __file__, "--alone", *(str(word) for word in words)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it failed"])[-1]


def changes_of(product: Path) -> dict[str, dict[str, np.ndarray]]:
    """What a product changes, by component and module: ΔW, rows of new words, or the weights' difference."""
    import persona
    from persona.core.adapters.entry import Checkpoint
    from persona.hub.registry import packaged

    found: dict[str, dict[str, np.ndarray]] = {}
    made = persona.load(product)
    if isinstance(made, Checkpoint):
        base = persona.load(Path(str(packaged("assets/mini"))))
        for component, tensors in made.components.items():
            found[component] = {
                name: np.asarray(tensor.read(), np.float64) - np.asarray(base.components[component][name].read())
                for name, tensor in tensors.items()
                if not name.endswith("k_proj.bias")
            }
        return found
    for name, change in made.deltas().items():
        component, _, path = name.partition(".")
        found.setdefault(component, {})[path] = np.asarray(change, np.float64)
    for embedding in made.embeddings:
        for component, vectors in embedding.vectors.items():
            found.setdefault(f"{component} words", {})[embedding.token] = np.asarray(vectors.read(), np.float64)
    return found


def read(backend: str, folder: Path) -> Made:
    """What `train` left in a folder."""
    from PIL import Image

    with (folder / "run" / "metrics.csv").open(encoding="utf-8") as file:
        losses = np.array([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]])
    product = Path((folder / "product.txt").read_text(encoding="utf-8"))
    base = str(json.loads((folder / "run" / "environment.json").read_text(encoding="utf-8"))["base_hash"])
    return Made(backend, losses, changes_of(product), np.asarray(Image.open(folder / "picture.png")), product, base)


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures, decibels; inf for the same bytes."""
    error = float(((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def compared(one: Made, other: Made) -> Iterator[tuple[str, float, float, bool]]:
    """(what, figure, target, within it) of two backends."""
    worst = float(np.max(np.abs(one.losses - other.losses) / np.abs(one.losses)))
    yield "loss, largest relative difference", worst, LOSS, worst <= LOSS
    for component, modules in one.changes.items():
        theirs = other.changes[component]
        assert modules.keys() == theirs.keys()
        apart = math.sqrt(sum(float(((modules[name] - theirs[name]) ** 2).sum()) for name in modules))
        size = math.sqrt(sum(float((value**2).sum()) for value in modules.values()))
        yield f"{component}, relative Frobenius", apart / size, WEIGHTS, apart <= WEIGHTS * size
    decibels = psnr(one.picture, other.picture)
    yield "picture, PSNR in dB", decibels, DECIBELS, decibels >= DECIBELS


def travelled(made: list[Made], prompt: str, folder: Path) -> Iterator[tuple[str, float, float, bool]]:
    """Each product converted to what the others write (a folder of weights is what all of them read), and drawn there,
    against the picture of its maker."""
    from PIL import Image

    import persona

    for one, other in permutations(made, 2):
        dialect, suffix = NATIVE[other.backend]
        name = f"{one.backend}-to-{other.backend}"
        product, picture = one.product, folder / f"{name}.png"
        if product.is_file():
            product = folder / f"{name}{suffix}"
            if not product.exists():
                persona.convert(one.product, product, to=dialect)
        wrong = "" if picture.is_file() else alone("draw", other.backend, product, prompt, picture)
        if wrong:
            print(f"{name}: {wrong}")
        figure = math.nan if wrong else psnr(one.picture, np.asarray(Image.open(picture)))
        yield f"{one.backend}'s product drawn by {other.backend}, PSNR in dB", figure, DECIBELS, figure >= DECIBELS


def sheet(made: list[Made], method: str, path: Path) -> None:
    """The pictures side by side, four times as large, under method and backend."""
    from PIL import Image, ImageDraw

    height, width = made[0].picture.shape[0] * 4, made[0].picture.shape[1] * 4
    whole = Image.new("RGB", (width * len(made), height + 20), "white")
    for number, one in enumerate(made):
        whole.paste(
            Image.fromarray(one.picture).resize((width, height), Image.Resampling.NEAREST), (number * width, 20)
        )
        ImageDraw.Draw(whole).text((number * width + 6, 4), f"{method}: {one.backend}", fill="black")
    whole.save(path)


def stacked(sheets: list[Path], path: Path) -> None:
    """Sheets of several methods under one another."""
    from PIL import Image

    parts = [Image.open(file) for file in sheets if file.is_file()]
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    for number, part in enumerate(parts):
        whole.paste(part, (0, sum(above.height for above in parts[:number])))
    whole.save(path)
    print(f"\nall methods: {path}")


def made_by(backend: str, place: Path, arguments: argparse.Namespace, threads: int = 1) -> Made | None:
    """What `backend` made in `place`, now or before; None when it cannot."""
    if (place / "picture.png").is_file():
        print(f"{backend}: {place} is there already and is read again")
    else:
        place.mkdir(parents=True, exist_ok=True)
        wrong = alone("train", backend, arguments.method, arguments.steps, arguments.seed, place, threads=threads)
        if wrong:
            print(f"{backend}: not compared. {wrong}")
            return None
    return read(backend, place)


def compare(arguments: argparse.Namespace) -> int:
    """Everything: run, read, compare, print, draw the sheet."""
    folder = Path(arguments.output).resolve() / arguments.method
    prompt = PROMPTS.get(arguments.method, PROMPT)
    made = [one for backend in arguments.backends if (one := made_by(backend, folder / backend, arguments))]
    if len(made) < 2:
        print("There are fewer than two backends to compare: persona backends")
        return 1
    if len({one.base for one in made}) > 1 or len({len(one.losses) for one in made}) > 1:
        print(f"The runs in {folder} are of different bases or lengths: remove it, and begin anew")
        return 1
    rows = [(f"{one.backend} and {other.backend}", *row)
            for one, other in combinations(made, 2) for row in compared(one, other)]  # fmt: skip
    if arguments.control:
        again = made_by(made[0].backend, folder / f"{made[0].backend}-two-threads", arguments, threads=2)
        rows += [(f"{made[0].backend} and itself on two threads", *row)
                 for row in (compared(made[0], again) if again else ())]  # fmt: skip
    if arguments.travel:
        rows += [("converted", *row) for row in travelled(made, prompt, folder)]
    print(f"\n{arguments.method}, {len(made[0].losses)} steps on mini, fp32, seed {arguments.seed}\n")
    print("| | | found | target | |\n|---|---|---|---|---|")
    for pair, what, figure, target, within in rows:
        print(f"| {pair} | {what} | {figure:.3g} | {target:g} | {'ok' if within else 'BEYOND'} |")
    sheet(made, arguments.method, folder / "sheet.png")
    keys = ("compared", "what", "found", "target", "within")
    (folder / "parity.json").write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1))
    print(f"\npictures side by side: {folder / 'sheet.png'}")
    return 0 if all(row[-1] for row in rows) else 1


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ["--alone"]:
        job, backend, *rest = sys.argv[2:]
        if job == "train":
            train(backend, rest[0], int(rest[1]), int(rest[2]), Path(rest[3]))
        else:
            draw(backend, Path(rest[0]), rest[1], Path(rest[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--method", default="lora", choices=[*RECIPES, "all"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--python", action="append", default=[], metavar="BACKEND=PATH")
    parser.add_argument("--travel", action="store_true", help="convert each product and draw it elsewhere")
    parser.add_argument("--control", action="store_true", help="compare the first backend with itself on two threads")
    parser.add_argument("--output", default="runs/parity", help="folder for runs, table and sheet (runs/parity)")
    arguments = parser.parse_args()
    for told in arguments.python:
        backend, _, path = told.partition("=")
        os.environ[f"PERSONA_{backend.upper()}_PYTHON"] = path
    if arguments.method != "all":
        return compare(arguments)
    folder = Path(arguments.output).resolve()
    codes = [compare(argparse.Namespace(**{**vars(arguments), "method": method})) for method in RECIPES]
    stacked([folder / method / "sheet.png" for method in RECIPES], folder / "sheet.png")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
