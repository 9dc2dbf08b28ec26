"""DreamBooth (Ruiz et al. 2022, arXiv 2208.12242): a rare word becomes the name of one subject.

Every update mixes pictures of the subject ("a sks robot") with pictures of its class that the base made itself
("a robot"); the second term keeps the class what it was (prior preservation). With kohya's `N_name` folders
("20_sks robot", "10_zwx cat") one run learns several subjects, each with its own class beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persona.core.host.errors import UsageError
from persona.core.options import flag_of, option
from persona.core.training.base import Base
from persona.core.training.pictures import kohya_name
from persona.core.training.plan import Generated, Picture, Stream, Trained, TrainingPlan, Weights
from persona.core.training.settings import TrainSettings, picture_size, plan_from
from persona.plugins.methods.lora import LowRankOptions, captioned, low_rank_parts


@dataclass(frozen=True)
class DreamBoothOptions(LowRankOptions):
    """What DreamBooth can be told; the options of deltas count with --lora only."""

    token: str = option("sks", help="The rare word that will name the subject.")
    class_word: str | None = option(None, help="What kind of thing it is: dog, toy, robot.", flag="--class")
    instance_prompt: str | None = option(None, help="Caption of the subject; default 'a TOKEN CLASS'.", metavar="TEXT")
    class_prompt: str | None = option(
        None, help="Caption of class pictures; default 'a CLASS'; {a|b} takes turns.", metavar="TEXT"
    )
    class_pictures: int = option(64, help="Class pictures for prior preservation; 0 trains without.", minimum=0)
    class_data: str | None = option(
        None,
        help="A folder of your own class pictures; of several classes, folders named N_CLASS in it.",
        metavar="DIR",
    )
    prior_weight: float = option(1.0, help="Weight of the class pictures in the loss.", minimum=0.0)
    lora: bool = option(False, help="Train low-rank deltas instead of the whole denoiser.")


@dataclass(frozen=True)
class Subject:
    """What is to be learned: its rare word, its class, how pictures without a caption are called, and the class's own
    caption."""

    token: str
    class_word: str
    instance_prompt: str
    class_prompt: str


class DreamBooth:
    """One subject or several under rare words, with prior preservation."""

    name = "dreambooth"
    summary = "One subject under a rare word, with prior preservation"
    Options = DreamBoothOptions

    def plan(
        self, options: DreamBoothOptions, settings: TrainSettings, base: Base, pictures: Sequence[Picture]
    ) -> TrainingPlan:
        """The whole denoiser (or deltas), from a stream of the subjects and one of each of their classes."""
        subjects = subjects_of(options, pictures)
        filled = tuple(instance(picture, subjects[folder_of(picture, subjects)]) for picture in pictures)
        classes = tuple(dict.fromkeys(subject.class_prompt for subject in subjects.values()))
        streams = [Stream("instance", filled)]
        if options.class_pictures:
            streams += [class_stream(options, settings, subjects, prompt, len(classes)) for prompt in classes]
        triggers = [f"{subject.token} {subject.class_word}".strip() for subject in subjects.values()]
        return plan_from(
            settings,
            method=self.name,
            trains=trained_parts(options, settings, base),
            streams=tuple(streams),
            size=picture_size(settings, base.native_size, base.latent_factor),
            metadata={"trigger": ", ".join(triggers), "class_prompt": ", ".join(classes)},
            notes=tuple(f"subject {trigger!r}" for trigger in triggers) if len(triggers) > 1 else (),
        )


def subjects_of(options: DreamBoothOptions, pictures: Sequence[Picture]) -> dict[str, Subject]:
    """The subjects by the names of kohya's folders, or one under "" for all pictures.

    A folder is called by its subject, "sks robot": the first word is the rare one, the rest its class. Raises
    UsageError for what cannot be learned so."""
    folders = tuple(dict.fromkeys(kohya_name(picture) for picture in pictures))
    if options.class_word is not None or options.instance_prompt is not None or "" in folders:
        return {"": checked(options, options.token, options.class_word, options.instance_prompt, options.class_prompt)}
    found = {}
    for folder in folders:
        token, _, class_word = folder.partition(" ")
        if not class_word.strip():
            raise UsageError(
                f"The folder {folder!r} names no class behind its word: kohya's folders are called 20_sks dog.",
                hint=f"Rename it to N_{folder} CLASS, or name word and class: --token {folder} --class dog",
            )
        found[folder] = checked(options, token, class_word.strip(), folder, None)
    return found


def folder_of(picture: Picture, subjects: dict[str, Subject]) -> str:
    """The key of the picture's subject."""
    return kohya_name(picture) if kohya_name(picture) in subjects else ""


def checked(
    options: DreamBoothOptions,
    token: str,
    class_word: str | None,
    instance_prompt: str | None,
    class_prompt: str | None,
) -> Subject:
    """A subject with its prompts filled in. Raises UsageError when they contradict what is to be learned."""
    if instance_prompt is None and class_word is None:
        raise UsageError(
            "DreamBooth has to know what kind of thing the subject is.", hint="Say it, for example: --class robot"
        )
    instance_prompt = instance_prompt or f"a {token} {class_word}"
    if token not in instance_prompt:
        raise UsageError(
            f"The instance prompt {instance_prompt!r} does not contain the word {token!r} that is to be learned.",
            hint=f'Put it in: --instance-prompt "a {token} {class_word or "robot"}", or name another word with --token',
        )
    class_prompt = class_prompt or (
        f"a {class_word}" if class_word else " ".join(instance_prompt.replace(token, "").split())
    )
    if options.class_pictures and token in class_prompt.split():
        raise UsageError(
            f"The class prompt {class_prompt!r} contains the subject's word {token!r}: the class would be pulled to "
            "the subject.",
            hint='Name the class alone: --class-prompt "a robot"',
        )
    return Subject(token, class_word or "", instance_prompt, class_prompt)


def instance(picture: Picture, subject: Subject) -> Picture:
    """A picture of the subject with its captions: its own, {token} and {class} filled in, or the instance prompt.

    Raises UsageError for a caption without the subject's word: nothing would be learned from it."""
    captions = tuple(
        caption.replace("{token}", subject.token).replace("{class}", subject.class_word) for caption in picture.captions
    )
    missing = [caption for caption in captions if subject.token not in caption]
    if missing:
        raise UsageError(
            f"The caption {missing[0]!r} of {picture.path} does not contain the word {subject.token!r} that is to be "
            "learned.",
            hint=f"Put {subject.token} (or {{token}}) into the caption, or name its word with --token",
        )
    (filled,) = captioned((dataclasses.replace(picture, captions=captions),), subject.instance_prompt)
    return filled


def class_stream(
    options: DreamBoothOptions, settings: TrainSettings, subjects: dict[str, Subject], prompt: str, count: int
) -> Stream:
    """The stream of one class. Of several, each weighs its part, so that --prior-weight means the same for any number;
    and each has its own folder of pictures, found by the class in --class-data."""
    word = next(subject.class_word for subject in subjects.values() if subject.class_prompt == prompt)
    folder = options.class_data
    if folder is not None and count > 1:
        named = [path for path in sorted(Path(folder).glob("*")) if path.is_dir() and path.name.endswith(f"_{word}")]
        folder = str(named[0]) if named else None
    return Stream(
        "class" if count == 1 else f"class {word}",
        generated=Generated(
            prompt=prompt, count=options.class_pictures, guidance_scale=settings.guidance_scale, folder=folder
        ),
        weight=options.prior_weight / count,
    )


WITH_WEIGHTS_TOO = ("train_denoiser", "train_text_encoder", "text_encoder_learning_rate")


def refuse_delta_options(options: DreamBoothOptions) -> None:
    """Raises UsageError for an option of deltas where whole weights are trained: it would have no effect."""
    for field in dataclasses.fields(LowRankOptions):
        if field.name not in WITH_WEIGHTS_TOO and getattr(options, field.name) != field.default:
            raise UsageError(
                f"{flag_of(field)} is an option of deltas, and whole weights are trained.", hint="Add --lora"
            )


def trained_parts(options: DreamBoothOptions, settings: TrainSettings, base: Base) -> tuple[Trained, ...]:
    """Deltas with --lora, else whole weights."""
    if options.lora:
        return low_rank_parts(options, settings.learning_rate, base)
    refuse_delta_options(options)
    parts: list[Trained] = []
    if options.train_denoiser:
        parts.append(Weights(base.denoiser, settings.learning_rate))
    if options.train_text_encoder:
        rate = options.text_encoder_learning_rate
        rate = settings.learning_rate if rate is None else rate
        parts += [Weights(name, rate) for name in base.text_encoders]
    if not parts:
        raise UsageError("Nothing would be trained.", hint="Add --train-text-encoder, or leave --no-train-denoiser out")
    return tuple(parts)
