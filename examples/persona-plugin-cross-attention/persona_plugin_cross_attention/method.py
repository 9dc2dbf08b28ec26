"""Personalise a model by what it reads in a word, not by how it paints.

Kumari et al. 2022 (Custom Diffusion, arXiv 2212.04488) saw that fine-tuning changes the keys and values of the
cross-attention layers most: the two matrices through which the caption enters the picture. They train only those, with
a new word for the subject and pictures of its class beside it. Here the two matrices get low-rank deltas, so that the
result is one small adapter file.

caption ─► text encoder ─► hidden ─┬─► to_k + ΔK ─► keys   ─┐
                                   └─► to_v + ΔV ─► values ─┴─► attention ─► picture
                                                  queries ─┘  (from the picture, untouched)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from persona.core.host.errors import UsageError
from persona.core.options import option
from persona.core.training.base import Base
from persona.core.training.plan import Generated, LowRank, NewToken, NewTokens, Picture, Stream, Trained, TrainingPlan
from persona.core.training.settings import TrainSettings, picture_size, plan_from
from persona.core.training.targets import check_rank, resolve_targets

KEYS_AND_VALUES = ("attn2.to_k", "attn2.to_v")
"""The modules that read the caption (diffusers calls cross-attention attn2)."""


@dataclass(frozen=True)
class CrossAttentionOptions:
    """What this method can be told; the command line makes its flags of these fields."""

    class_word: str | None = option(None, help="What kind of thing it is: dog, toy, robot.", flag="--class")
    token: str = option("sks", help="The word that will name the subject.")
    new_word: bool = option(False, help="Learn an embedding for the word too, starting from the class word's.")
    word_learning_rate: float = option(5e-3, help="Learning rate of that embedding.", minimum=0.0)
    rank: int = option(8, help="Rank of the deltas.", minimum=1)
    class_pictures: int = option(64, help="Class pictures for prior preservation; 0 trains without.", minimum=0)
    prior_weight: float = option(1.0, help="Weight of the class pictures in the loss.", minimum=0.0)


class CrossAttention:
    """Low-rank deltas on the keys and values of cross-attention, with prior preservation."""

    name = "cross-attention"
    summary = "Only how words are read: keys and values of cross-attention"
    Options = CrossAttentionOptions

    def plan(
        self, options: CrossAttentionOptions, settings: TrainSettings, base: Base, pictures: Sequence[Picture]
    ) -> TrainingPlan:
        """Deltas on attn2's to_k and to_v (and a new word), from a stream of the subject and one of its class."""
        if options.class_word is None:
            raise UsageError("The method has to know what kind of thing the subject is.", hint="Say it: --class robot")
        prompt = f"a {options.token} {options.class_word}"
        captioned = tuple(dataclasses.replace(picture, captions=picture.captions or (prompt,)) for picture in pictures)
        streams = [Stream("instance", captioned)]
        if options.class_pictures:
            prior = Generated(f"a {options.class_word}", options.class_pictures, guidance_scale=settings.guidance_scale)
            streams.append(Stream("class", generated=prior, weight=options.prior_weight))
        return plan_from(
            settings,
            method=self.name,
            trains=self._trains(options, settings, base),
            streams=tuple(streams),
            size=picture_size(settings, base.native_size, base.latent_factor),
            metadata={"trigger": f"{options.token} {options.class_word}"},
        )

    def _trains(self, options: CrossAttentionOptions, settings: TrainSettings, base: Base) -> tuple[Trained, ...]:
        targets = resolve_targets(base, base.denoiser, KEYS_AND_VALUES)
        check_rank(base, base.denoiser, targets, options.rank)
        deltas = LowRank(base.denoiser, targets, options.rank, float(options.rank), settings.learning_rate)
        if not options.new_word:
            return (deltas,)
        word = NewToken(options.token, initializer=str(options.class_word))
        return (deltas, NewTokens(base.text_encoders, (word,), options.word_learning_rate))
