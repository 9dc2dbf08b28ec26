"""Every kind of picture file comes out as the same upright, opaque RGB; what cannot is one clear line."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from persona.core.host.errors import DataError
from persona.core.training.buckets import fit
from persona.core.training.decode import (
    MAX_PIXELS,
    decode,
    fit_picture,
    mask_values,
    picture_mask,
    picture_pixels,
    pixels,
)
from persona.core.training.plan import Picture

# four corners that tell every turn and mirroring from every other
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)


@pytest.fixture
def saved(tmp_path):
    def save(image, name="picture.png", **options):
        path = tmp_path / name
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
        return path

    return save


def colour(decoded, x=0, y=0):
    return decoded.image.getpixel((x, y))


def large_corners(size=64):
    return np.kron(CORNERS, np.ones((size // 2, size // 2, 1), np.uint8))


def gradient(width=40, height=30):
    """No symmetry at all: red rises to the right, green downwards, blue along the diagonal."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 3], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.tif", "a.ppm", "a.tga", "wrong-suffix.jpg"])
def test_lossless_files_come_out_as_they_were_drawn(saved, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    kind = "PNG" if name == "wrong-suffix.jpg" else None
    decoded = decode(saved(gradient(), name, format=kind, **options))
    assert decoded.image.mode == "RGB" and decoded.alpha is None and decoded.notes == ()
    np.testing.assert_array_equal(np.asarray(decoded.image), gradient())


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_followed(saved, orientation, turn):
    """The eight orientations of EXIF 2.3, table 7: 6 is shown after a quarter turn clockwise, and so on."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(saved(gradient(), exif=exif))
    np.testing.assert_array_equal(np.asarray(decoded.image), turn(gradient()))
    assert any("upright" in note for note in decoded.notes) == (orientation != 1)


def test_transparent_parts_are_white_unless_asked_otherwise(saved):
    drawn = np.zeros((2, 2, 4), np.uint8)
    drawn[0, 0] = (255, 0, 0, 255)
    drawn[0, 1] = (255, 0, 0, 51)  # a fifth of red on white: 255, 204, 204
    path = saved(drawn)
    decoded = decode(path)
    assert [colour(decoded, *at) for at in ((0, 0), (1, 0), (0, 1))] == [(255, 0, 0), (255, 204, 204), (255, 255, 255)]
    assert np.asarray(decoded.alpha).tolist() == [[255, 51], [0, 0]]
    assert decoded.notes == ("transparent; put on white",)
    assert colour(decode(path, background=(0, 0, 255)), 0, 1) == (0, 0, 255)


def test_an_opaque_alpha_channel_is_no_transparency(saved):
    drawn = np.dstack([gradient(), np.full((30, 40), 255, np.uint8)])
    decoded = decode(saved(drawn))
    assert decoded.alpha is None and decoded.notes == ()
    np.testing.assert_array_equal(np.asarray(decoded.image), gradient())


def test_a_transparent_palette_colour_is_white(saved):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 0, 0])
    for name in ("a.png", "a.gif"):
        decoded = decode(saved(image, name, transparency=0))
        assert colour(decoded) == (255, 255, 255) and colour(decoded, 1, 0) == (200, 0, 0)
    assert colour(decode(saved(image, "b.png"))) == (10, 20, 30)


def test_greyscale_and_black_and_white_become_rgb(saved):
    assert colour(decode(saved(np.full((2, 2), 77, np.uint8)))) == (77, 77, 77)
    assert colour(decode(saved(Image.new("1", (2, 2), 1)))) == (255, 255, 255)
    grey_alpha = Image.merge("LA", [Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 51)])
    assert colour(decode(saved(grey_alpha))) == (204, 204, 204)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_greyscale_keeps_its_tones(saved, name):
    """Pillow's convert("RGB") makes everything above 255 of 65535 white."""
    decoded = decode(saved(np.array([[0, 257, 32896, 65535]], np.uint16), name))
    assert [colour(decoded, x)[0] for x in range(4)] == [0, 1, 128, 255]
    assert "16-bit" in decoded.notes[0]


def test_sixteen_bit_colour_keeps_its_tones(tmp_path):
    """A PNG written by hand, since Pillow writes none: 2x1, colour type 2, 16 bits."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + struct.pack(">6H", 65535, 32896, 257, 0, 65535, 514)
    content = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(row))
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b""))
    decoded = decode(path)
    assert colour(decoded) == (255, 128, 1) and colour(decoded, 1) == (0, 255, 2)


def test_cmyk_becomes_rgb_and_says_so(saved):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # all magenta and yellow: red
    for name in ("a.jpg", "a.tif"):
        decoded = decode(saved(image, name))
        assert colour(decoded)[0] > 245 and max(colour(decoded)[1:]) < 10
        assert "CMYK" in decoded.notes[0]


def test_floating_point_greyscale_has_a_range_or_is_refused(saved):
    assert colour(decode(saved(np.array([[0.0, 1.0], [0.2, 0.2]], np.float32), "a.tif")), 0, 1) == (51, 51, 51)
    with pytest.raises(DataError, match=r"b\.tif has floating-point values outside"):
        decode(saved(np.array([[0.0, 3.0]], np.float32), "b.tif"))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_the_first_frame_of_an_animation_is_used_and_that_is_said(saved, name):
    frames = [Image.new("RGB", (8, 8), tone) for tone in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if name.endswith("webp") else {}
    decoded = decode(saved(frames[0], name, save_all=True, append_images=frames[1:], **options))
    assert colour(decoded) == (255, 0, 0)
    assert any("first of 3" in note for note in decoded.notes)


def test_a_colour_profile_other_than_srgb_is_told(saved):
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode(saved(gradient(), "a.png", icc_profile=srgb)).notes == ()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert "colour profile" in decode(saved(gradient(), "b.png", icc_profile=lab)).notes[0]
    assert decode(saved(gradient(), "c.png", icc_profile=b"broken")).notes == ()


def png_bytes(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    return (tmp_path / "whole.png").read_bytes()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tif"])
def test_a_truncated_file_is_one_clear_line(saved, name):
    drawn = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = saved(drawn, name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"{name} cannot be read as a picture") as raised:
        decode(path)
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    "content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%!PS-Adobe EPSF-3.0\n", b"\xff\xd8\xff"]
)
def test_what_is_no_picture_is_one_clear_line(tmp_path, content):
    path = tmp_path / "thing.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"thing\.png cannot be read as a picture"):
        decode(path)


def test_no_damage_anywhere_gives_anything_but_a_picture_or_our_error(tmp_path):
    whole = png_bytes(tmp_path)
    generator = np.random.default_rng(1)
    path = tmp_path / "damaged.png"
    for _ in range(150):
        damaged = bytearray(whole)
        for place in generator.integers(0, 200, 4):
            damaged[place] = generator.integers(0, 256)
        path.write_bytes(bytes(damaged))
        try:
            assert decode(path).image.mode == "RGB"
        except DataError as error:
            assert "damaged.png" in error.message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        decode(tmp_path / "gone.png")


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_refused_before_memory_is_taken(tmp_path, side):
    """A small file with a huge header: only the header may be looked at."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    path = tmp_path / "bomb.png"
    path.write_bytes(head + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)))
    assert side * side > MAX_PIXELS
    with pytest.raises(DataError, match=r"bomb\.png is too large"):
        decode(path)


def test_pixels_are_in_minus_one_to_one_with_channels_first(saved):
    decoded = decode(saved(large_corners()))
    found = pixels(decoded, fit((64, 64), (64, 64)))
    assert found.dtype == np.float32 and found.shape == (3, 64, 64) and found.flags.c_contiguous
    np.testing.assert_allclose(found, large_corners().transpose(2, 0, 1) / 255 * 2 - 1, atol=1e-6)
    np.testing.assert_array_equal(pixels(decoded, fit((64, 64), (64, 64)), mirrored=True), found[:, :, ::-1])


@pytest.mark.parametrize("size", [(32, 32), (64, 16), (200, 90)])
@pytest.mark.parametrize("corner", ["middle", "start", "end"])
def test_resize_and_crop_are_pillows_one_after_the_other(saved, size, corner):
    drawn = np.asarray(Image.fromarray(gradient(13, 9)).resize((157, 103), Image.Resampling.BICUBIC))
    decoded = decode(saved(drawn))
    made = fit((157, 103), size)
    if corner != "middle":
        made = made.at(0, 0) if corner == "start" else made.at(*made.spare)
    left, top = made.left, made.top
    whole = Image.fromarray(drawn).resize(made.resized, Image.Resampling.LANCZOS)
    expected = np.asarray(whole.crop((left, top, left + size[0], top + size[1])), np.float32)
    np.testing.assert_allclose((pixels(decoded, made).transpose(1, 2, 0) + 1) * 127.5, expected, atol=1.01)


def test_reducing_averages_fine_detail_away(saved):
    """Without antialiasing a chequerboard reduced by eight would be black or white, not grey."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    found = pixels(decode(saved(board)), fit((256, 256), (32, 32)))
    assert np.abs(found).max() < 0.05


def test_an_extreme_panorama_takes_no_more_memory_than_its_crop(saved):
    decoded = decode(saved(np.full((2, 20_000, 3), 200, np.uint8)))
    found = pixels(decoded, fit((20_000, 2), (512, 512)))  # resized as a whole it would be 5,120,000 x 512
    assert found.shape == (3, 512, 512) and abs(found.mean() - (200 / 127.5 - 1)) < 0.01


def test_masks_follow_their_picture_at_another_resolution(saved):
    drawn = np.zeros((100, 200), np.uint8)
    drawn[:, 100:] = 255  # right half, of a mask half as large as its picture
    found = mask_values(decode(saved(drawn)), fit((400, 200), (64, 64)), 8)
    assert found.shape == (1, 8, 8) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], [[0, 0, 0, 0, 1, 1, 1, 1]] * 8)
    np.testing.assert_allclose(
        mask_values(decode(saved(drawn)), fit((400, 200), (64, 64)), 8, mirrored=True), found[:, :, ::-1]
    )


def test_a_picture_can_be_masked_by_its_own_alpha(saved):
    drawn = np.full((64, 64, 4), 255, np.uint8)
    drawn[:32, :, 3] = 0
    path = str(saved(drawn))
    found = picture_mask(Picture(path, (), mask=path, size=(64, 64)), (64, 64), 8)
    np.testing.assert_allclose(found[0], [[0] * 8] * 4 + [[1] * 8] * 4)
    opaque = str(saved(np.zeros((64, 64, 3), np.uint8), "opaque.png"))
    assert picture_mask(Picture(opaque, (), mask=opaque), (64, 64), 8).min() == 1
    assert picture_mask(Picture(path, ()), (64, 64), 8) is None


def test_random_crops_belong_to_the_seed_and_the_bytes(saved):
    picture = Picture(str(saved(gradient(400, 30))), (), sha256="5a" * 32)
    places = [fit_picture(picture, (400, 30), (30, 30), crop=crop, seed=1).left for crop in range(40)]
    assert len(set(places)) > 30 and min(places) < 60 and max(places) > 310 and max(places) <= 370
    assert places[3] == fit_picture(picture, (400, 30), (30, 30), crop=3, seed=1).left
    other = Picture(picture.path, (), sha256="77" * 32)
    assert places != [fit_picture(other, (400, 30), (30, 30), crop=crop, seed=1).left for crop in range(40)]
    expected = gradient(400, 30)[:, places[0] : places[0] + 30].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(picture_pixels(picture, (30, 30), crop=0, seed=1), expected, atol=1e-6)
    middle = gradient(400, 30)[:, 185:215].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(picture_pixels(picture, (30, 30)), middle, atol=1e-6)
