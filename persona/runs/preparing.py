"""A recipe with everything that can be known before a framework is loaded: base, pictures, plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from persona.core.host.host import Host
from persona.core.training.base import Base
from persona.core.training.captions import alternatives
from persona.core.training.plan import Picture, Stream, TrainingPlan
from persona.core.training.priors import class_picture_folder, missing_class_pictures
from persona.core.training.settings import TrainSettings
from persona.hub.bases import cache_folder
from persona.runs.bases import open_any_base
from persona.runs.optimizers import with_optimizer
from persona.runs.pictures import scan_folder
from persona.runs.products import check_also
from persona.runs.recipe import Recipe
from persona.runs.validation import validation_plan


@dataclass(frozen=True)
class Prepared:
    """A recipe with everything that can be known before a framework is loaded."""

    recipe: Recipe
    base: Base
    plan: TrainingPlan
    own_class_pictures: Mapping[str, tuple[Picture, ...]]
    notes: tuple[str, ...]
    validation: TrainingPlan | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """What is sampled: the prompts asked for, else the first caption of every stream; nothing with --no-samples."""
        if not self.recipe.settings.samples:
            return ()
        return self.recipe.settings.sample_prompts or default_prompts(self.plan)


def prepare(recipe: Recipe, host: Host, tell: Callable[[str], None] = lambda text: None) -> Prepared:
    """Open the base's description, look at the pictures, let the method make its plan. No framework is imported.
    `tell` hears what takes long: a base that has to be converted first."""
    base = open_any_base(recipe.base, host, tell)
    method = host.load("method", recipe.method)()
    pictures, notes = scan_folder(Path(recipe.data))
    pictures = tuple(as_told(picture, recipe.settings) for picture in pictures)
    plan: TrainingPlan = method.plan(recipe.options, recipe.settings, base, pictures)
    plan = with_optimizer(plan, recipe.settings.optimizer_option, host)
    held_out = validation_plan(method, recipe, base, plan)
    check_wishes(recipe.settings, plan, host)
    own: dict[str, tuple[Picture, ...]] = {}
    for stream in plan.streams:
        if stream.generated and stream.generated.folder:
            own[stream.name], more = scan_folder(Path(stream.generated.folder))
            notes += more
        notes += class_pictures_in_words(stream, len(own.get(stream.name, ())), base, plan)
    wanted = (recipe.settings.width or plan.width, recipe.settings.height or plan.height)
    if wanted != (plan.width, plan.height):
        notes += (
            f"{wanted[0]}x{wanted[1]} is no multiple of {base.latent_factor}: training at {plan.width}x{plan.height}",
        )
    return Prepared(recipe, base, plan, own, (*notes, *plan.notes), held_out)


def class_pictures_in_words(stream: Stream, own: int, base: Base, plan: TrainingPlan) -> tuple[str, ...]:
    """Whose the class pictures are, how many are still to be made, and where those are kept."""
    if stream.generated is None:
        return ()
    made = max(0, stream.generated.count - own)
    told = f"{stream.name} pictures ({stream.generated.prompt}): {own} of your own"
    if not made:
        return (told,)
    missing = missing_class_pictures(stream, own, base, plan, cache_folder())
    folder = class_picture_folder(stream.generated, base, plan, cache_folder())
    return (f"{told}, {made} by the base, of which {missing} have to be made now; kept in {folder}",)


def check_wishes(settings: TrainSettings, plan: TrainingPlan, host: Host) -> None:
    """Raises UsageError, before anything is trained, for trackers and dialects that are not there."""
    for name in settings.tracker:
        host.load("tracker", name)()
    kinds = {part.kind for part in plan.trains}
    check_also(settings.also, whole_weights="weights" in kinds, words_only=kinds == {"new-tokens"}, host=host)


def as_told(picture: Picture, settings: TrainSettings) -> Picture:
    """A picture with what the settings say of all: repeats, and its own transparency as its mask."""
    mask = picture.mask or (picture.path if settings.alpha_mask else None)
    return dataclasses.replace(picture, repeats=picture.repeats * settings.repeats, mask=mask)


def default_prompts(plan: TrainingPlan) -> tuple[str, ...]:
    """The first caption of each stream."""
    found = [
        alternatives(stream.generated.prompt)[0] if stream.generated else stream.pictures[0].captions[0]
        for stream in plan.streams
        if stream.generated or (stream.pictures and stream.pictures[0].captions)
    ]
    return tuple(dict.fromkeys(found))
