"""One run of the table: train, paint the prompts, keep pictures and figures, throw the weights away.

    FOLDER/data/SUBJECT/            the training pictures with their captions
    FOLDER/class/SUBJECT/           class pictures, made once by the base for all runs of the subject
    FOLDER/before/SUBJECT.npz       what the base makes of the same prompts and noise
    FOLDER/runs/ROW/SUBJECT-SEED.npz, .json     what the run made, and what it took

Every file is written whole or not at all, so that a killed benchmark goes on where it was."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from personalise_figures import shuffled
from personalise_rows import CONTROL, TOKEN, Asked, Bench, Row, Subject, a, colour_of, of_class, of_others, of_subject
from PIL import Image

import persona
from persona.core.training.captions import alternatives
from persona.core.training.run import write_atomically

Array = np.ndarray[Any, np.dtype[Any]]
Pictures = Mapping[str, Array]
"""subject, class and others [n, 64, 64, 3] uint8."""
CLASS_SEED = 9000
"""The noise of the first class picture: far from that of the pictures that are judged."""


def training_folder(subject: Subject, bench: Bench) -> Path:
    """The subject's training pictures, each with the caption its name says: a sks robot on a red background."""
    data = bench.folder / "data" / subject.name
    for picture in sorted(subject.train.glob("*.png")):
        caption = f"a {TOKEN} {subject.class_word} on {a(colour_of(picture))} background"
        write_atomically(data / f"{picture.stem}.txt", caption.encode())
        write_atomically(data / picture.name, picture.read_bytes())
    return data


def class_folder(subject: Subject, bench: Bench) -> Path:
    """Pictures of the class by the base itself, each with its caption, made once for all runs of the subject.

    A run makes them itself when it is given none; here three seeds and two rows share them."""
    place = bench.folder / "class" / subject.name
    if place.is_dir():
        return place
    prompts = alternatives(subject.class_prompt)
    asked = [Asked(prompts[n % len(prompts)], CLASS_SEED + n, "") for n in range(bench.class_pictures)]
    building = place.with_name(f".{place.name}-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    for number, pixels in enumerate(paint(asked, bench)):
        write_atomically(building / f"{number:04d}.txt", asked[number].prompt.encode())
        write_atomically(building / f"{number:04d}.png", png(pixels))
    try:
        building.rename(place)
    except OSError:  # another process was first; the pictures are the same
        shutil.rmtree(building)
    return place


def png(pixels: Array) -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def paint(asked: Sequence[Asked], bench: Bench, given: Path | None = None) -> Array:
    """What the base makes of prompts with what was trained, an adapter's file or a run of whole weights; [n, height,
    width, 3] uint8."""
    from persona.api import host
    from persona.core.adapters.entry import Adapter
    from persona.core.host.contracts import Runtime, SampleRequest
    from persona.hub.bases import open_base
    from persona.runs.backends import choose_backend

    whole = given is not None and given.is_dir()
    session = choose_backend(host(), None).open(open_base(str(given) if whole else bench.base), None, Runtime())
    try:
        if given is not None and not whole:
            adapter = persona.load(given)
            assert isinstance(adapter, Adapter)
            session.load_adapters([(adapter, 1.0)])
        prompts, seeds = tuple(one.prompt for one in asked), tuple(one.seed for one in asked)
        request = SampleRequest(
            prompts, seeds, steps=bench.sampler_steps, guidance_scale=bench.guidance_scale, batch=len(asked)
        )
        return np.asarray(session.sample(request))
    finally:
        session.close()


def painted(called: str, subject: Subject, bench: Bench, given: Path | None = None) -> Pictures:
    """All pictures a run is judged by."""
    parts = {"subject": of_subject(called, subject), "class": of_class(subject), "others": of_others()}
    pictures = paint([one for part in parts.values() for one in part], bench, given)
    cuts = np.cumsum([len(part) for part in parts.values()])[:-1]
    return dict(zip(parts, np.split(pictures, cuts), strict=True))


def before(subject: Subject, bench: Bench) -> Pictures:
    """What the base makes of the subject's prompts with the class word in its place, and of the others; `sks`: with
    the rare word, which it has not learned."""
    file = bench.folder / "before" / f"{subject.name}.npz"
    if not file.is_file():
        plain = f"{subject.article} {subject.class_word}"
        rare = paint(of_subject(f"a {TOKEN} {subject.class_word}", subject), bench)
        keep(file, {**painted(plain, subject, bench), "sks": rare})
    return read(file)


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a run took: seconds of training (loading and latents included, pictures not), bytes at the peak and of the
    product. The control row trains nothing."""

    row: str
    subject: str
    seed: int
    file_bytes: int
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    steps: int | None = None


def file_of(row: Row, subject: Subject, seed: int, bench: Bench) -> Path:
    """Where a run's figures are; its pictures lie beside them."""
    return bench.folder / "runs" / row.name.replace(" ", "-").replace(",", "") / f"{subject.name}-{seed}.json"


def make(row: Row, subject: Subject, seed: int, bench: Bench) -> None:
    """Make a run of the table, unless it is there already."""
    file = file_of(row, subject, seed, bench)
    if file.is_file():
        return
    work = bench.folder / f"work-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        if row.name == CONTROL:
            taken, given = shuffle(row, subject, seed, bench, work)
        else:
            taken, given = train(row, subject, seed, bench, work)
        keep(file.with_suffix(".npz"), painted(row.called(subject), subject, bench, given))
        write_atomically(file, json.dumps(dataclasses.asdict(taken), indent=1).encode())
        if row.method == "lora" and given.is_file() and row.name != CONTROL:
            shutil.copy(given, file.with_suffix(".safetensors"))  # the control row's
    finally:
        shutil.rmtree(work, ignore_errors=True)


def train(row: Row, subject: Subject, seed: int, bench: Bench, work: Path) -> tuple[Taken, Path]:
    """Train; what it took, and what to paint with: an adapter file, or the folder of whole weights."""
    data, classes = training_folder(subject, bench), class_folder(subject, bench)
    recipe = {**row.recipe(subject, classes, bench.class_pictures), "sample_steps": 1, "save_every": 0, **bench.options}
    forget_peak()
    begun = time.monotonic()
    run = persona.train(row.method, data, base=bench.base, output=work / "run", seed=seed, **recipe)
    seconds = time.monotonic() - begun
    facts = run.facts()
    product = run.product
    assert product is not None
    size = sum(path.stat().st_size for path in files_in(product))
    taken = Taken(row.name, subject.name, seed, size, seconds, facts["peak_memory_bytes"], facts["product_steps"])
    return taken, product if product.is_file() else run.path


def shuffle(row: Row, subject: Subject, seed: int, bench: Bench, work: Path) -> tuple[Taken, Path]:
    """The control: the LoRA of the same subject and seed, the values of each of its tensors in another order."""
    from persona.core.adapters.tensor import in_memory
    from persona.formats.containers.safetensors import Safetensors

    trained = bench.folder / "runs" / "lora" / f"{subject.name}-{seed}.safetensors"
    state = persona.read_state(trained)
    made = work / "shuffled.safetensors"
    made.parent.mkdir(parents=True)
    values = shuffled({name: np.asarray(tensor) for name, tensor in state.items()}, seed)
    metadata = Safetensors().read(trained).metadata
    Safetensors().write(made, {name: in_memory(array) for name, array in values.items()}, metadata)
    return Taken(row.name, subject.name, seed, made.stat().st_size), made


def files_in(path: Path) -> Iterable[Path]:
    """The file itself, or every file in a folder."""
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def forget_peak() -> None:
    """Give unused memory back and let the process's peak begin anew, where the system can (Linux); elsewhere the peak
    is that of the largest run so far."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def keep(file: Path, pictures: Pictures) -> None:
    """Write pictures."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **pictures)
    write_atomically(file, buffer.getvalue())


def read(file: Path) -> Pictures:
    """Pictures as they were kept."""
    with np.load(file, allow_pickle=False) as kept:
        return {name: kept[name] for name in kept.files}
