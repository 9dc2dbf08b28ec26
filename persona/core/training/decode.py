"""One picture file as the numbers a trainer sees: whatever kind of file, upright, opaque, 8-bit RGB.

Every change to a picture that its owner might not expect is told in `Decoded.notes`; what cannot be read is a
DataError of one line. Pillow is imported when the first picture is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from persona.core.host.errors import DataError
from persona.core.training.buckets import Fit, Size, fit
from persona.core.training.order import crop_offsets
from persona.core.training.plan import Picture

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "ICO")
"""Kinds of files that are opened, by their bytes. Left out are those that run another program (EPS, WMF)."""

MAX_PIXELS = 1 << 27
"""Pictures of more pixels are refused before memory is taken: 11,585 × 11,585, which is 400 MB as RGB."""

WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Decoded:
    """A decoded picture: `image` in mode RGB and upright, `alpha` in mode L where it is not opaque everywhere (else
    None), and `notes` on what was changed on the way."""

    image: Image.Image
    alpha: Image.Image | None
    notes: tuple[str, ...]

    @property
    def size(self) -> Size:
        """(width, height), upright."""
        return self.image.size


def decode(path: str | Path, *, background: tuple[int, int, int] = WHITE) -> Decoded:
    """Read a picture file; transparent parts show `background` (RGB, 0..255).

    Raises DataError, with the file's name and the reason, for a file that is missing, no picture, damaged, larger than
    MAX_PIXELS, or whose values have no known range.
    """
    from PIL import ImageOps

    notes: list[str] = []
    with _clear_errors(path), _opened(path) as image:
        _check_size(path, image.size)
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # phones keep a preview or depth map behind the picture as MPO
            notes.append(f"animated or of several pages; the first of {frames} is used")
        image.load()
        profile = image.info.get("icc_profile")
        try:
            upright = ImageOps.exif_transpose(image)
        except Exception:
            upright = image.copy()
            notes.append("its EXIF data are damaged; the orientation in them is not used")
        if upright.size != image.size or image.getexif().get(0x0112, 1) not in (0, 1):
            notes.append("turned upright as its EXIF data say")
        plain = _eight_bit(path, upright, notes)
    notes += _profile_notes(profile)
    alpha = plain.getchannel("A") if plain.mode == "RGBA" else None
    if alpha is not None and alpha.getextrema()[0] == 255:
        alpha = None
    if alpha is not None:
        notes.append(f"transparent; put on {'white' if background == WHITE else 'the background ' + str(background)}")
    return Decoded(_opaque(plain, background), alpha, tuple(notes))


@contextmanager
def _clear_errors(path: str | Path) -> Iterator[None]:
    """Decoders raise almost anything for damaged files; make it one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except PermissionError as error:
        raise DataError(f"{path} may not be read: {error.strerror}.") from error
    except MemoryError as error:
        raise DataError(f"{path} is too large for the memory of this machine.", hint="Make it smaller.") from error
    except Exception as error:
        raise DataError(f"{path} cannot be read as a picture: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is of no known kind"
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    from PIL import Image

    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        opened = Image.open(path, formats=formats)
    except Image.DecompressionBombError as error:
        raise _too_large(path, "more pixels than Pillow opens") from error
    with opened:
        yield opened


def _check_size(path: str | Path, size: Size) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise _too_large(path, f"{size[0]}x{size[1]}")


def _too_large(path: str | Path, what: str) -> DataError:
    return DataError(
        f"{path} is too large ({what}; at most {MAX_PIXELS // 1_000_000} million pixels are read).",
        hint="Make it smaller: a trainer sees no more than its training size.",
    )


def _eight_bit(path: str | Path, image: Image.Image, notes: list[str]) -> Image.Image:
    """In mode RGB, or RGBA where the file has transparency of any kind."""
    from PIL import Image

    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255, which makes the picture white
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{path} has values beyond 16 bits ({values.min()}..{values.max()}).", hint=_SAVE_AGAIN)
        notes.append("16-bit greyscale; brought to 8 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        floats = np.asarray(image)
        if not (np.isfinite(floats).all() and floats.min() >= 0.0 and floats.max() <= 1.0):
            raise DataError(f"{path} has floating-point values outside 0..1.", hint=_SAVE_AGAIN)
        notes.append("floating-point greyscale; brought to 8 bits")
        return Image.fromarray(np.round(floats * 255.0).astype(np.uint8)).convert("RGB")
    if image.mode == "CMYK":
        notes.append("CMYK; made RGB without a colour profile")
    elif image.mode in ("1", "L", "LA", "La"):
        notes.append("greyscale")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


_SAVE_AGAIN = "Save it as an 8-bit PNG."


def _profile_notes(profile: bytes | None) -> list[str]:
    """Says when colours mean something else than sRGB: they are used as they are, as the peers do."""
    if not profile:
        return []
    try:
        import io

        from PIL import ImageCms

        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip()
    except Exception:
        return []
    return [] if "srgb" in name.lower() or not name else [f"colour profile {name!r} is not applied"]


def _opaque(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    from PIL import Image

    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")


def _cut(image: Image.Image, made: Fit, size: Size, resample: int, mirrored: bool) -> Image.Image:
    """The part of `image` that `made` keeps, at `size`. Only that part is computed, however long the picture is."""
    from PIL import Image

    across, down = image.size[0] / made.resized[0], image.size[1] / made.resized[1]
    box = (
        made.left * across,
        made.top * down,
        min(image.size[0], (made.left + made.size[0]) * across),
        min(image.size[1], (made.top + made.size[1]) * down),
    )
    cut = image.resize(size, Image.Resampling(resample), box=box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else cut


def pixels(decoded: Decoded, made: Fit, *, mirrored: bool = False) -> NDArray[np.float32]:
    """The picture resized (Lanczos, antialiased) and cropped as `made` says, [3, height, width] float32 in −1..1."""
    from PIL import Image

    cut = _cut(decoded.image, made, made.size, Image.Resampling.LANCZOS, mirrored)
    values = np.asarray(cut, np.float32) / np.float32(127.5) - np.float32(1.0)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def mask_values(mask: Decoded, made: Fit, factor: int, *, mirrored: bool = False) -> NDArray[np.float32]:
    """A mask fitted as its picture was, averaged to the size of a latent, [1, height / factor, width / factor] float32
    in 0..1 (1 is learned). A mask with transparency says it by its alpha, another by its brightness.

    The mask may have another resolution than its picture: `made` is the picture's.
    """
    from PIL import Image

    image = mask.alpha if mask.alpha is not None else mask.image.convert("L")
    size = (made.size[0] // factor, made.size[1] // factor)
    cut = _cut(image, made, size, Image.Resampling.BOX, mirrored)
    return (np.asarray(cut, np.float32) / np.float32(255.0))[None]


def fit_picture(picture: Picture, original: Size, size: Size, *, crop: int | None, seed: int) -> Fit:
    """The middle of the picture when `crop` is None, else its `crop`-th random place, which depends on the seed and
    the picture's bytes only."""
    made = fit(original, size)
    if crop is None:
        return made
    slot = int(picture.sha256[:8], 16) if picture.sha256 else 0
    left, top = crop_offsets(seed, crop, [slot], made.spare)[0].tolist()
    return made.at(left, top)


def picture_pixels(
    picture: Picture, size: Size, *, crop: int | None = None, mirrored: bool = False, seed: int = 0
) -> NDArray[np.float32]:
    """A training picture at `size` (width, height), [3, height, width] float32 in −1..1; see `fit_picture` for `crop`.
    Raises DataError when it cannot be read."""
    decoded = decode(picture.path)
    return pixels(decoded, fit_picture(picture, decoded.size, size, crop=crop, seed=seed), mirrored=mirrored)


def picture_mask(
    picture: Picture, size: Size, factor: int, *, crop: int | None = None, mirrored: bool = False, seed: int = 0
) -> NDArray[np.float32] | None:
    """The mask of a training picture, [1, height / factor, width / factor] float32 in 0..1, or None without one.

    A picture whose `mask` is its own path is masked by its alpha. Raises DataError when the mask cannot be read.
    """
    if picture.mask is None:
        return None
    mask = decode(picture.mask)
    if picture.mask == picture.path and mask.alpha is None:  # opaque: all of it is learned
        return np.ones((1, size[1] // factor, size[0] // factor), np.float32)
    original = mask.size if picture.size == (0, 0) else picture.size
    return mask_values(mask, fit_picture(picture, original, size, crop=crop, seed=seed), factor, mirrored=mirrored)
