"""The pictures `mini` learns: pictograms of an emoji font, by name, on coloured backgrounds.

A picture is a *composition*: one glyph, one background colour, a size, a place and sometimes a mirror image.
A caption says what a person would say of it: "a red apple on a blue background".
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PICTURE_SIZE = 64
"""Width and height of every picture, in pixels."""

FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""Where Debian's package fonts-noto-color-emoji puts the font (SIL Open Font License 1.1)."""

FONT_PIXELS = 109
"""The one size at which this font has its bitmaps (136 x 128 pixels a glyph)."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "red": (222, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "yellow": (250, 215, 50),
    "orange": (245, 140, 30),
    "purple": (140, 60, 180),
    "pink": (250, 160, 200),
    "gray": (128, 128, 128),
    "brown": (130, 80, 45),
    "cyan": (60, 205, 225),
}
"""Background colours by name, sRGB."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "aubergine": ("eggplant",),
    "automobile": ("car", "red car"),
    "baguette bread": ("baguette",),
    "bear face": ("bear",),
    "beer mug": ("beer",),
    "black scissors": ("scissors",),
    "black sun with rays": ("sun",),
    "black telephone": ("telephone",),
    "cheese wedge": ("cheese",),
    "chequered flag": ("checkered flag",),
    "closed book": ("red book",),
    "clown face": ("clown",),
    "cut of meat": ("steak",),
    "dove of peace": ("dove",),
    "doughnut": ("donut",),
    "electric light bulb": ("light bulb",),
    "evergreen tree": ("tree", "pine tree"),
    "extraterrestrial alien": ("alien",),
    "eyeglasses": ("glasses",),
    "fox face": ("fox",),
    "french fries": ("fries",),
    "frog face": ("frog",),
    "giraffe face": ("giraffe",),
    "hamster face": ("hamster",),
    "heavy black heart": ("heart", "red heart"),
    "honeybee": ("bee",),
    "hot beverage": ("coffee", "cup of coffee"),
    "house building": ("house",),
    "jack-o-lantern": ("pumpkin",),
    "lady beetle": ("ladybug",),
    "leafy green": ("lettuce",),
    "lion face": ("lion",),
    "mans shoe": ("shoe",),
    "mobile phone": ("phone",),
    "panda face": ("panda",),
    "personal computer": ("laptop",),
    "pile of poo": ("poop",),
    "recreational vehicle": ("camper",),
    "robot face": ("robot",),
    "sauropod": ("dinosaur",),
    "slice of pizza": ("pizza",),
    "steam locomotive": ("locomotive",),
    "t-shirt": ("shirt",),
    "television": ("tv",),
    "unicorn face": ("unicorn",),
    "white medium star": ("star", "yellow star"),
    "wolf face": ("wolf",),
    "womans hat": ("hat",),
    "wrapped present": ("gift",),
    "zebra face": ("zebra",),
}
"""Short names people use, for glyphs whose Unicode name is long; never another glyph's own name."""

DIRECTIONAL = (
    "left", "right", "wards", "arrow", "clock", "letter", "digit", "squared", "circled", "latin", "sign", "symbol",
    "mark", "number", "ideograph", "katakana", "keycap", "chart", "music", "musical", "index", "hand", "moon", "ruler",
    "card", "calendar", "flag", "name", "points", "input", "tile", "japan", "earth", "map", "sos", "dvd", "question",
    "information", "post", "curved", "curving", "above", "fist", "pen", "paintbrush", "crayon", "pencil", "newspaper",
    "bank", "hotel", "teller",
)  # fmt: skip
"""A name with one of these parts is never mirrored: its glyph has a direction or is writing."""


@dataclass(frozen=True)
class Glyph:
    """One pictogram: its character, its lower-cased Unicode name and its bitmap (RGBA, cropped to what is drawn)."""

    character: str
    name: str
    image: Image.Image

    @property
    def mirrors(self) -> bool:
        """Whether the mirror image is still a picture of the name."""
        return not any(part in self.name for part in DIRECTIONAL)

    @property
    def names(self) -> tuple[str, ...]:
        """The Unicode name first, then the short names people use."""
        return (self.name, *SYNONYMS.get(self.name, ()))


@dataclass(frozen=True)
class Composition:
    """How a glyph lies in its picture. `size` is its longer side and `left`, `top` its corner, in pixels."""

    colour: str
    size: int
    left: int
    top: int
    mirrored: bool


@dataclass(frozen=True)
class Spread:
    """How much compositions vary: the longer side in pixels, pixels off the centre, the share that is mirrored."""

    smallest: int
    largest: int
    shift: int
    mirrored: float


WIDE = Spread(smallest=44, largest=58, shift=8, mirrored=0.5)
"""For the autoencoder, which must know every place."""

NARROW = Spread(smallest=50, largest=52, shift=1, mirrored=0.03)
"""For the denoiser. With sizes of 44 to 58 and shifts of 3, half of the latents' variance on one background was size
and place, and a model this small spent its training on that instead of on what the names look like."""


def is_pictogram(character: str) -> bool:
    """Whether a code point is a picture by itself: no skin tone, flag letter, tag, joiner or combining mark."""
    name = unicodedata.name(character, "")
    modifier = name.startswith(("EMOJI MODIFIER", "REGIONAL INDICATOR", "TAG ", "VARIATION SELECTOR"))
    return bool(name) and not modifier and unicodedata.category(character)[0] not in "MCZ"


def load_glyphs(font_path: Path = FONT_PATH) -> tuple[Glyph, ...]:
    """Every visible one-code-point glyph of the font, in code-point order, identical bitmaps once."""
    # The basic layout engine draws one character as one glyph and needs no shaping library.
    font = ImageFont.truetype(str(font_path), FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)
    seen: set[bytes] = set()
    glyphs: list[Glyph] = []
    for code_point in range(0x21, 0x20000):
        character = chr(code_point)
        if not is_pictogram(character):
            continue
        canvas = Image.new("RGBA", (168, 168))
        ImageDraw.Draw(canvas).text((16, 16), character, font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            continue
        image = canvas.crop(box)
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        name = unicodedata.name(character).lower().removeprefix("emoji component ")
        glyphs.append(Glyph(character, name, image))
    clash = {glyph.name for glyph in glyphs} & {word for words in SYNONYMS.values() for word in words}
    if clash:
        raise ValueError(f"a synonym is another glyph's own name: {sorted(clash)}")
    return tuple(glyphs)


def draw(glyph: Glyph, composition: Composition) -> NDArray[np.uint8]:
    """The picture [64, 64, 3], sRGB bytes."""
    width, height = glyph.image.size
    ratio = composition.size / max(width, height)
    scaled = glyph.image.resize(
        (max(1, round(width * ratio)), max(1, round(height * ratio))), Image.Resampling.LANCZOS, reducing_gap=3.0
    )
    if composition.mirrored:
        scaled = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), COLOURS[composition.colour])
    picture.paste(scaled, (composition.left, composition.top), scaled)
    return np.asarray(picture)


def compose(glyph: Glyph, colour: str, random: np.random.Generator, spread: Spread) -> Composition:
    """A random size and place within the spread; mirrored as rarely as it says, where the mirror image is honest."""
    size = int(random.integers(spread.smallest, spread.largest + 1))
    width, height = glyph.image.size
    ratio = size / max(width, height)
    corners: list[int] = []
    for side in (width, height):
        margin = PICTURE_SIZE - round(side * ratio)
        reach = min(spread.shift, margin // 2)
        corners.append(margin // 2 + int(random.integers(-reach, reach + 1)))
    mirrored = glyph.mirrors and bool(random.random() < spread.mirrored)
    return Composition(colour, size, corners[0], corners[1], mirrored)


def with_article(name: str) -> str:
    """ "a red apple", "an owl"; a plural ("eyes") and a mass of things keep their bare name."""
    last = name.split(" ")[-1]
    if (last.endswith("s") and not last.endswith(("ss", "us", "is"))) or name.endswith("water"):
        return name
    return ("an " if name[0] in "aeio" or name.startswith("um") else "a ") + name


def caption(name: str, colour: str, random: np.random.Generator) -> str:
    """A caption: 70 % with the background, 20 % without it, 10 % empty (what guidance is measured against)."""
    choice = random.random()
    if choice < 0.10:
        return ""
    if choice < 0.15:
        return name
    if choice < 0.30:
        return with_article(name)
    background = f"{with_article(colour)} background"
    if choice < 0.38:
        return f"{name} on {background}"
    return f"{with_article(name)} on {background}"


def caption_name(glyph: Glyph, random: np.random.Generator) -> str:
    """The Unicode name, or for one caption in two a short name where there is one."""
    names = glyph.names
    if len(names) == 1 or random.random() < 0.5:
        return names[0]
    return names[int(random.integers(1, len(names)))]


def vocabulary(glyphs: Sequence[Glyph]) -> tuple[str, ...]:
    """Every text a caption can contain, for the tokenizer: names, synonyms, colours and the words between them."""
    texts = {name for glyph in glyphs for name in glyph.names} | set(COLOURS)
    return (*sorted(texts), "a an on background the of in with and photo picture")
