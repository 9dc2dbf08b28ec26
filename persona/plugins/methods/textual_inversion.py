"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): a new word, and nothing else, is learned.

"a photo of <toy>" ─► token ids ─► embedding table ─► text encoder ─► denoiser
                                   [ … frozen rows … ]  (frozen)      (frozen)
                                   [ <toy>: n rows   ]  ◄── the only thing that is trained
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from persona.core.host.errors import UsageError
from persona.core.options import option
from persona.core.training.base import Base
from persona.core.training.captions import TEMPLATES, templates_for
from persona.core.training.clip_words import ClipWords
from persona.core.training.pictures import kohya_name
from persona.core.training.plan import NewToken, NewTokens, Picture, Stream, TrainingPlan
from persona.core.training.settings import TrainSettings, picture_size, plan_from


@dataclass(frozen=True)
class TextualInversionOptions:
    """What textual inversion can be told."""

    placeholder: tuple[str, ...] = option(
        ("<subject>",), help="The new word (repeatable: several in one run).", metavar="WORD"
    )
    initializer: tuple[str, ...] = option(
        (), help="A known word the new one starts from, such as toy (one for each placeholder).", metavar="WORD"
    )
    vectors: int | None = option(
        None,
        help="Rows of a new word, all trained; default: as many as the initializer's tokens.",
        minimum=1,
        maximum=32,
    )
    learnable_property: str = option(
        "object", help="What is learned; chooses the captions of pictures without one.", choices=tuple(TEMPLATES)
    )
    replaces: tuple[str, ...] = option(
        (), help="Words in captions that the placeholder stands for (repeatable).", metavar="TEXT"
    )
    captions: bool = option(True, help="Use the captions beside the pictures; without, templates alone.")
    norm_limit: float | None = option(
        3.0, help="No row grows longer than this many times the median row of the base; 0 lets them.", minimum=0.0
    )


class TextualInversion:
    """New words learned from pictures; the model itself stays as it is."""

    name = "textual-inversion"
    summary = "A new word for an object, a style or a face: a file of a few kilobytes"
    Options = TextualInversionOptions

    def plan(
        self,
        options: TextualInversionOptions,
        settings: TrainSettings,
        base: Base,
        pictures: Sequence[Picture],
    ) -> TrainingPlan:
        """New rows in every text encoder, from one stream of pictures captioned with the new words."""
        vocabularies = {name: ClipWords.read(base.tokenizers[tokenizer_of(name)]) for name in base.text_encoders}
        tokens, notes = new_tokens(options, vocabularies)
        part = NewTokens(base.text_encoders, tokens, settings.learning_rate, norm_limit=options.norm_limit or None)
        words = [token.placeholder for token in tokens]
        return plan_from(
            settings,
            method=self.name,
            trains=(part,),
            streams=(Stream("pictures", tuple(captioned(picture, words, options) for picture in pictures)),),
            size=picture_size(settings, base.native_size, base.latent_factor),
            metadata={"trigger": " ".join(words)},
            notes=notes,
        )


def tokenizer_of(component: str) -> str:
    """tokenizer for text_encoder, tokenizer_2 for text_encoder_2."""
    return component.replace("text_encoder", "tokenizer")


def new_tokens(
    options: TextualInversionOptions, vocabularies: Mapping[str, ClipWords]
) -> tuple[tuple[NewToken, ...], tuple[str, ...]]:
    """The tokens to be made, and what to tell of how their initializers split.

    Raises UsageError for a placeholder that is no new word, and for initializers that are missing or too long."""
    placeholders, initializers = options.placeholder, options.initializer
    if len(set(placeholders)) != len(placeholders):
        raise UsageError("A placeholder is given twice.", hint="Each new word has a name of its own")
    if not initializers:
        raise UsageError(
            f"{placeholders[0]} needs a known word to start from.", hint="Say what it is like: --initializer toy"
        )
    if len(initializers) not in (1, len(placeholders)):
        raise UsageError(
            f"{len(placeholders)} placeholders have {len(initializers)} initializers.",
            hint="Give one --initializer for all of them, or one for each, in the same order",
        )
    if len(initializers) == 1:
        initializers = initializers * len(placeholders)
    tokens, notes = [], []
    for placeholder, initializer in zip(placeholders, initializers, strict=True):
        check_placeholder(placeholder, vocabularies)
        splits = {name: words.split(initializer) for name, words in vocabularies.items()}
        longest = max(splits.values(), key=len)
        if not longest:
            raise UsageError(f"The initializer {initializer!r} is empty.", hint="Name a word: --initializer toy")
        vectors = options.vectors or len(longest)
        if vectors < len(longest):
            raise UsageError(
                f"The initializer {initializer!r} is {len(longest)} tokens ({' + '.join(longest)}), and {placeholder} "
                f"has {vectors} vector{'s' if vectors > 1 else ''}.",
                hint=f"Make room for all of them: --vectors {len(longest)}, or take a word of one token",
            )
        if len(longest) > 1:
            notes.append(
                f"the initializer {initializer!r} is {len(longest)} tokens ({' + '.join(longest)}); "
                f"{placeholder} gets {vectors} vectors"
            )
        tokens.append(NewToken(placeholder, initializer, vectors))
    return tuple(tokens), tuple(notes)


def check_placeholder(placeholder: str, vocabularies: Mapping[str, ClipWords]) -> None:
    """Raises UsageError for a placeholder that is empty, has spaces, or is a word already: diffusers refuses to load
    such a file (loaders/textual_inversion.py), and the old word would be lost."""
    if not placeholder or len(placeholder.split()) != 1 or placeholder != placeholder.strip():
        raise UsageError(f"{placeholder!r} is not one word.", hint="Name it like this: --placeholder '<my-toy>'")
    for words in vocabularies.values():
        if words.knows(placeholder):
            raise UsageError(
                f"The base has the word {placeholder} already.", hint=f"Take a new one: --placeholder '<{placeholder}>'"
            )


def captioned(picture: Picture, words: Sequence[str], options: TextualInversionOptions) -> Picture:
    """The picture with captions that have a new word in them: its own, those of kohya's folder name, or templates.

    In a caption `{token}`, `{token} {class}` and the texts of `replaces` become the word; with several words it is the
    one the picture's folder is named after. Raises UsageError for a caption without a word."""
    word = word_of(picture, words)
    own = () if not options.captions or picture.captions == (kohya_name(picture),) else picture.captions
    if not own and word is None:
        raise UsageError(
            f"{picture.path} has no caption, and nothing says which of {', '.join(words)} it shows.",
            hint=f"Put the word into a caption file beside it, or the picture into a folder 1_{bare(words[0])}",
        )
    if not own:
        return dataclasses.replace(picture, captions=templates_for(options.learnable_property, str(word)))
    captions = tuple(_filled(caption, word, options.replaces) for caption in own)
    missing = next((caption for caption in captions if not any(name in caption for name in words)), None)
    if missing is not None:
        raise UsageError(
            f"The caption {missing!r} of {picture.path} does not contain {' or '.join(words)}.",
            hint="Put {token} into it, name the words it stands for (--replaces TEXT), or leave captions out: "
            "--no-captions",
        )
    return dataclasses.replace(picture, captions=captions)


def word_of(picture: Picture, words: Sequence[str]) -> str | None:
    """The new word a picture shows: the only one, or the one its folder is called by (`20_my-toy` for `<my-toy>`)."""
    if len(words) == 1:
        return words[0]
    names = {Path(picture.path).parent.name, kohya_name(picture)}
    return next((word for word in words if word in names or bare(word) in names), None)


def bare(word: str) -> str:
    """A placeholder without its brackets, as a folder can be called."""
    return word.strip("<>")


def _filled(caption: str, word: str | None, replaces: Sequence[str]) -> str:
    if word is None:
        return caption
    for text in (*replaces, "{token} {class}", "{token}"):
        caption = caption.replace(text, word)
    return caption
