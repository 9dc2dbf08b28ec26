"""DreamBooth (Ruiz et al. 2022, arXiv 2208.12242): a rare word becomes the name of one subject.

Every update mixes pictures of the subject ("a sks robot") with pictures of its class that the base made itself
("a robot"); the second term keeps the class what it was (prior preservation)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from persona.core.host.errors import UsageError
from persona.core.options import option
from persona.core.training.base import Base
from persona.core.training.plan import Generated, Picture, Stream, Trained, TrainingPlan, Weights
from persona.core.training.settings import TrainSettings, picture_size, plan_from
from persona.core.training.targets import ATTENTION
from persona.plugins.methods.lora import LoraOptions, captioned, low_rank_parts


@dataclass(frozen=True)
class DreamBoothOptions:
    """What DreamBooth can be told."""

    token: str = option("sks", help="The rare word that will name the subject.")
    class_word: str | None = option(None, help="What kind of thing it is: dog, toy, robot.", flag="--class")
    instance_prompt: str | None = option(None, help="Caption of the subject; default 'a TOKEN CLASS'.", metavar="TEXT")
    class_prompt: str | None = option(None, help="Caption of class pictures; default 'a CLASS'.", metavar="TEXT")
    class_pictures: int = option(64, help="Class pictures for prior preservation; 0 trains without.", minimum=0)
    class_data: str | None = option(None, help="A folder of your own class pictures.", metavar="DIR")
    prior_weight: float = option(1.0, help="Weight of the class pictures in the loss.", minimum=0.0)
    lora: bool = option(False, help="Train low-rank deltas instead of the whole denoiser.")
    rank: int = option(8, help="Rank of the deltas (with --lora).", minimum=1)
    alpha: float | None = option(None, help="Scale is alpha / rank; default alpha = rank (with --lora).")
    targets: tuple[str, ...] = option(
        ATTENTION,
        help="Module name endings or wildcards (with --lora; repeatable).",
        flag="--target",
        metavar="PATTERN",
    )
    train_text_encoder: bool = option(False, help="Train the text encoders too.")
    text_encoder_learning_rate: float | None = option(None, help="Their learning rate, when it is another.")


class DreamBooth:
    """One subject under a rare word, with prior preservation."""

    name = "dreambooth"
    summary = "One subject under a rare word, with prior preservation"
    Options = DreamBoothOptions

    def plan(
        self, options: DreamBoothOptions, settings: TrainSettings, base: Base, pictures: Sequence[Picture]
    ) -> TrainingPlan:
        """The whole denoiser (or deltas), from a stream of the subject and one of its class."""
        instance_prompt, class_prompt = self._prompts(options)
        streams = [Stream("instance", self._captioned(options, pictures, instance_prompt))]
        if options.class_pictures:
            streams.append(
                Stream(
                    "class",
                    generated=Generated(
                        prompt=class_prompt,
                        count=options.class_pictures,
                        guidance_scale=settings.guidance_scale,
                        folder=options.class_data,
                    ),
                    weight=options.prior_weight,
                )
            )
        return plan_from(
            settings,
            method=self.name,
            trains=self._trains(options, settings, base),
            streams=tuple(streams),
            size=picture_size(settings, base.native_size, base.latent_factor),
            metadata={"trigger": f"{options.token} {options.class_word or ''}".strip(), "class_prompt": class_prompt},
        )

    def _prompts(self, options: DreamBoothOptions) -> tuple[str, str]:
        if options.instance_prompt is None and options.class_word is None:
            raise UsageError(
                "DreamBooth has to know what kind of thing the subject is.", hint="Say it, for example: --class robot"
            )
        instance = options.instance_prompt or f"a {options.token} {options.class_word}"
        if options.token not in instance:
            raise UsageError(
                f"The instance prompt {instance!r} does not contain the word {options.token!r} that is to be learned.",
                hint=f'Put it in: --instance-prompt "a {options.token} {options.class_word or "robot"}", '
                "or name another word with --token",
            )
        class_prompt = options.class_prompt or (
            f"a {options.class_word}"
            if options.class_word
            else " ".join(instance.replace(options.token, "").split())  # the instance prompt without the rare word
        )
        if options.class_pictures and options.token in class_prompt.split():
            raise UsageError(
                f"The class prompt {class_prompt!r} contains the subject's word {options.token!r}: the class would be "
                "pulled to the subject.",
                hint='Name the class alone: --class-prompt "a robot"',
            )
        return instance, class_prompt

    def _captioned(
        self, options: DreamBoothOptions, pictures: Sequence[Picture], instance_prompt: str
    ) -> tuple[Picture, ...]:
        filled = []
        for picture in pictures:
            captions = tuple(
                caption.replace("{token}", options.token).replace("{class}", options.class_word or "")
                for caption in picture.captions
            )
            missing = [caption for caption in captions if options.token not in caption]
            if missing:
                raise UsageError(
                    f"The caption {missing[0]!r} of {picture.path} does not contain the word {options.token!r} that is "
                    "to be learned.",
                    hint=f"Put {options.token} (or {{token}}) into the caption, or name its word with --token",
                )
            filled.append(dataclasses.replace(picture, captions=captions))
        return captioned(filled, instance_prompt)

    def _trains(self, options: DreamBoothOptions, settings: TrainSettings, base: Base) -> tuple[Trained, ...]:
        if options.lora:
            return low_rank_parts(
                LoraOptions(
                    rank=options.rank,
                    alpha=options.alpha,
                    targets=options.targets,
                    train_text_encoder=options.train_text_encoder,
                    text_encoder_learning_rate=options.text_encoder_learning_rate,
                ),
                settings.learning_rate,
                base,
            )
        parts: list[Trained] = [Weights(base.denoiser, settings.learning_rate)]
        if options.train_text_encoder:
            rate = options.text_encoder_learning_rate or settings.learning_rate
            parts += [Weights(name, rate) for name in base.text_encoders]
        return tuple(parts)
