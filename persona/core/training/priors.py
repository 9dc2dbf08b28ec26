"""Class pictures for prior preservation, made by the base itself in the same command: batched, kept in the user's cache
under everything that decides them (base, prompt, sampler, size, seed), one file a picture, so that an interrupted
start goes on where it stopped and the next run finds them ready."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from persona.core.training.base import Base
from persona.core.training.captions import alternatives
from persona.core.training.plan import Generated, Picture, Stream, TrainingPlan
from persona.core.training.processes import ALONE, Processes, computes_together
from persona.core.training.run import write_atomically

if TYPE_CHECKING:
    from persona.core.host.contracts import SampleRequest, Session

Report = Callable[[int, int], None]
PICTURES_AT_ONCE = 8


def class_picture_folder(generated: Generated, base: Base, plan: TrainingPlan, cache: Path) -> Path:
    """Where the pictures of a Generated stream are kept: named by what decides them."""
    decides = {
        "base": base.hash,
        "prompt": generated.prompt,
        "negative": generated.negative_prompt,
        "steps": generated.steps,
        "guidance": generated.guidance_scale,
        "sampler": generated.sampler,
        "size": [plan.width, plan.height],
        "seed": plan.seed,
        "precision": plan.precision,
    }
    name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]
    return cache / "class-pictures" / name


def class_picture_file(number: int, wanted: int) -> str:
    """The file of class picture `number` when `wanted` are made. Pictures are made in blocks of PICTURES_AT_ONCE; the
    last, smaller block has its size in its names, because a batch of another size may give other last bits."""
    size = min(PICTURES_AT_ONCE, wanted - number // PICTURES_AT_ONCE * PICTURES_AT_ONCE)
    return f"{number:05d}.png" if size == PICTURES_AT_ONCE else f"{number:05d}-of-{size}.png"


def class_picture_seed(plan: TrainingPlan, number: int) -> int:
    """The sampling seed of class picture `number`; far from the seeds of samples."""
    return 1_000_000 + plan.seed * 100_003 + number


def class_prompt(generated: Generated, number: int) -> str:
    """The prompt of class picture `number`: the alternatives of `{a|b}` take turns."""
    prompts = alternatives(generated.prompt)
    return prompts[number % len(prompts)]


def request_for(generated: Generated, plan: TrainingPlan, numbers: Sequence[int]) -> SampleRequest:
    """What a session is asked for to make some class pictures."""
    from persona.core.host.contracts import SampleRequest

    return SampleRequest(
        prompts=tuple(class_prompt(generated, number) for number in numbers),
        seeds=tuple(class_picture_seed(plan, number) for number in numbers),
        negative_prompt=generated.negative_prompt,
        width=plan.width,
        height=plan.height,
        steps=generated.steps,
        guidance_scale=generated.guidance_scale,
        sampler=generated.sampler,
        batch=PICTURES_AT_ONCE,
    )


def missing_class_pictures(stream: Stream, own: int, base: Base, plan: TrainingPlan, cache: Path) -> int:
    """How many class pictures a stream with `own` ones of the user's would have to make now."""
    generated = stream.generated
    if generated is None:
        return 0
    wanted = max(0, generated.count - own)
    folder = class_picture_folder(generated, base, plan, cache)
    return sum(not (folder / class_picture_file(number, wanted)).is_file() for number in range(wanted))


def fill_stream(
    stream: Stream,
    own: Sequence[Picture],
    *,
    base: Base,
    plan: TrainingPlan,
    session: Session,
    cache: Path,
    report: Report,
    processes: Processes = ALONE,
) -> Stream:
    """The stream with its pictures: `own` ones first, then as many made by the base as `count` still asks for.

    Several processes deal the blocks that are missing among them; a block is the same bits whoever makes it. When none
    can compute alone, one without a block in the last turn makes another's, and it is not kept."""
    from PIL import Image

    generated = stream.generated
    if generated is None:
        return stream
    kept = [
        dataclasses.replace(picture, captions=picture.captions or alternatives(generated.prompt)) for picture in own
    ]
    wanted = max(0, generated.count - len(kept))
    folder = class_picture_folder(generated, base, plan, cache)
    files = [folder / class_picture_file(number, wanted) for number in range(wanted)]
    blocks = [range(start, min(wanted, start + PICTURES_AT_ONCE)) for start in range(0, wanted, PICTURES_AT_ONCE)]
    missing = [block for block in blocks if not all(files[number].is_file() for number in block)]
    processes.barrier()  # everybody has looked before anybody makes one
    mine = missing[processes.rank :: processes.count]
    for turn, numbers in enumerate(mine):
        report(wanted - sum(map(len, missing[turn * processes.count :])), wanted)
        # The whole block again, though a kill may have left some of it: the same batch gives the same bits.
        for number, pixels in zip(numbers, session.sample(request_for(generated, plan, numbers)), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG")
            write_atomically(files[number], buffer.getvalue(), elsewhere="export PERSONA_CACHE=FOLDER")
    if computes_together(session) and len(mine) * processes.count < len(missing):
        session.sample(request_for(generated, plan, missing[-1]))
    processes.barrier()
    report(wanted, wanted)
    pictures = (_picture(file, class_prompt(generated, number)) for number, file in enumerate(files))
    return dataclasses.replace(stream, pictures=(*kept, *pictures))


def _picture(file: Path, prompt: str) -> Picture:
    return Picture(str(file), (prompt,), sha256=hashlib.sha256(file.read_bytes()).hexdigest())
