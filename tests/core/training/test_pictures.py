"""Folders as people have them: what is understood, what is told, and the line to type when it is not."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from persona.core.host.errors import DataError
from persona.core.training.pictures import scan


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "my pictures"


def draw(path, tone=None, size=(48, 32), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = sum(path.name.encode()) % 256 if tone is None else tone
    Image.new("RGB", size, (tone, 10, 20)).save(path, **options)
    return path


def names(found):
    return [picture.path.rsplit("/", 1)[-1] for picture in found.pictures]


def told(found):
    return {problem.path.rsplit("/", 1)[-1]: problem.message for problem in found.problems}


def test_pictures_come_in_the_order_of_their_names_with_size_and_digest(folder):
    for name in ("b.PNG", "a.jpg", "c.webp"):
        draw(folder / name)
    (folder / "subject.yaml").write_text("name: robot")
    found = scan(folder)
    assert names(found) == ["a.jpg", "b.PNG", "c.webp"] and found.problems == ()
    first = found.pictures[0]
    assert first.path == str(folder / "a.jpg") and first.size == (48, 32) and first.captions == ()
    assert first.sha256 == hashlib.sha256((folder / "a.jpg").read_bytes()).hexdigest()
    assert first.mask is None and first.repeats == 1


def test_the_size_is_that_of_the_upright_picture(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(folder / "a.jpg", exif=exif)
    found = scan(folder)
    assert found.pictures[0].size == (32, 48) and "upright" in told(found)["a.jpg"]


def test_captions_come_from_text_files(folder):
    draw(folder / "a.png")
    draw(folder / "b.png")
    draw(folder / "c.png")
    (folder / "a.txt").write_text("α猫 插画风格\nα猫\n", encoding="utf-8-sig")
    (folder / "b.txt").write_text("\n")
    found = scan(folder)
    assert [picture.captions for picture in found.pictures] == [("α猫 插画风格", "α猫"), (), ()]
    assert told(found) == {"b.txt": "this caption file is empty"}


def test_captions_come_from_a_metadata_table(folder):
    """The layout of Hugging Face's imagefolder, written by pandas with a byte order mark."""
    for number in range(3):
        draw(folder / "train" / f"{number}.jpg", tone=number * 40)
    (folder / "train/metadata.csv").write_bytes(
        '\ufefffile_name,text\r\n0.jpg,二次元\r\n1.jpg,"red, round"\r\n'.encode()
    )
    (folder / "train/1.txt").write_text("another")
    found = scan(folder / "train")
    assert [picture.captions for picture in found.pictures] == [("二次元",), ("red, round",), ()]
    assert told(found) == {"1.jpg": "its caption is in the metadata table; 1.txt is not used"}


def test_data_juicer_rows_with_absolute_paths_are_followed(folder, tmp_path):
    """Rows {"text": …, "image": ["/abs/0.jpg"]}, the second of a data set that was moved since."""
    away = draw(tmp_path / "elsewhere" / "0.jpg")
    draw(folder / "1.jpg")
    rows = [
        {"text": "二次元", "image": [str(away)]},
        {"text": "moved", "image": ["/data/of/another/machine/1.jpg"]},
        {"text": "gone", "image": ["/data/of/another/machine/2.jpg"]},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = scan(folder)
    assert {picture.path: picture.captions for picture in found.pictures} == {
        str(away): ("二次元",),
        str(folder / "1.jpg"): ("moved",),
    }
    problem = found.problems[0]
    assert not problem.used and problem.message == "line 3 names /data/of/another/machine/2.jpg, which is not there"
    (folder / "metadata.jsonl").rename(folder / "filtered.jsonl")
    assert names(scan(folder / "filtered.jsonl")) == ["0.jpg", "1.jpg"]


def test_kohya_folders_become_repeats_and_names_become_captions(folder):
    """kohya's layout: --data names the folder above `10_sks dog`; sub-folders repeat by their number."""
    draw(folder / "10_sks dog" / "a.png")
    draw(folder / "10_sks dog" / "b.png")
    (folder / "10_sks dog" / "b.txt").write_text("a sks dog on grass")
    draw(folder / "2_dog" / "c.png")
    draw(folder / "notes" / "d.png")
    found = scan(folder)
    assert [
        (name, picture.captions, picture.repeats) for name, picture in zip(names(found), found.pictures, strict=True)
    ] == [
        ("a.png", ("sks dog",), 10),
        ("b.png", ("a sks dog on grass",), 10),
        ("c.png", ("dog",), 2),
    ]
    assert told(found)["10_sks dog"] == (
        "pictures: 2, each used 10 times an epoch; 1 of them, without a caption, called 'sks dog'"
    )
    assert told(found)["notes"] == "this sub-folder is not used; pictures in it: 1"


def test_a_kohya_folder_itself_will_do_too(folder):
    """bmaltais/kohya_ss#3374: "No data found", because the folder must be the parent of N_name. Here either works."""
    draw(folder / "10_sks dog" / "a.png")
    assert names(scan(folder / "10_sks dog")) == ["a.png"]


def test_a_year_is_not_a_number_of_repeats(folder):
    draw(folder / "2024_holiday" / "a.png")
    with pytest.raises(DataError, match=r"sub-folder 2024_holiday has 1\."):
        scan(folder)


@pytest.mark.parametrize("below", ["img", "downloads/robot"])
def test_a_folder_of_folders_names_the_one_with_pictures_and_the_line_to_type(folder, below):
    draw(folder / below / "a.png")
    draw(folder / below / "b.png")
    with pytest.raises(DataError, match=rf"sub-folder {below} has 2\.") as raised:
        scan(folder)
    assert raised.value.hint == f"Train on it: --data '{folder / below}'"


def test_a_project_folder_of_kohya_leads_to_its_img(folder):
    draw(folder / "img" / "10_sks dog" / "a.png")
    (folder / "log").mkdir()
    with pytest.raises(DataError, match="has folders of them") as raised:
        scan(folder)
    assert raised.value.hint == f"Train on it: --data '{folder / 'img'}'"


def test_pictures_in_sub_folders_beside_others_are_told(folder):
    draw(folder / "a.png")
    draw(folder / "more" / "b.png")
    found = scan(folder)
    assert names(found) == ["a.png"] and told(found) == {"more": "this sub-folder is not used; pictures in it: 1"}


@pytest.mark.parametrize(
    ("files", "words"),
    [([], "has no pictures; it is empty"), (["notes.md", "data.zip"], r"has no pictures \(only \.md, \.zip\)")],
)
def test_a_folder_without_pictures_says_what_it_has(folder, files, words):
    folder.mkdir()
    for name in files:
        (folder / name).write_text("x")
    with pytest.raises(DataError, match=words) as raised:
        scan(folder)
    assert "--data DIR" in raised.value.hint


def test_a_folder_that_is_not_there_brings_the_nearest(folder):
    draw(folder / "a.png")
    with pytest.raises(DataError, match="does not exist") as raised:
        scan(folder.with_name("my picture"))
    assert raised.value.hint == f"Did you mean --data '{folder}'?"


def test_a_file_is_no_folder(folder):
    path = draw(folder / "a.png")
    with pytest.raises(DataError, match="is a file") as raised:
        scan(path)
    assert str(folder) in raised.value.hint


def test_unreadable_pictures_are_left_out_and_told_one_line_each(folder):
    draw(folder / "a.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "c.jpg").write_text("<html>not found</html>")
    (folder / "d.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "._a.png").write_bytes(b"macOS")
    found = scan(folder)
    assert names(found) == ["a.png"]
    assert [problem.used for problem in found.problems] == [False] * 3
    assert told(found)["c.jpg"] == "cannot be read as a picture: it is of no known kind."
    assert told(found)["b.png"].startswith("cannot be read as a picture: ")
    assert told(found)["d.HEIC"] == ".HEIC files are not read"


def test_a_folder_of_unreadable_pictures_is_an_error_with_the_first_reason(folder):
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    (folder / "b.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"\(2 tried\)\. .*a\.png: cannot be read as a picture"):
        scan(folder)


def test_a_caption_in_another_encoding_leaves_its_picture_out(folder):
    draw(folder / "a.png")
    draw(folder / "b.png")
    (folder / "b.txt").write_bytes("一只可爱的狗".encode("gbk"))
    found = scan(folder)
    assert names(found) == ["a.png"] and "b.txt is not UTF-8" in told(found)["b.png"]
    assert "iconv" in found.problems[0].hint


def test_a_broken_table_is_an_error_not_a_folder_without_captions(folder):
    draw(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"')
    with pytest.raises(DataError, match="line 1 is not JSON"):
        scan(folder)


def test_masks_lie_in_their_folder_under_the_pictures_name(folder):
    draw(folder / "a.jpg", size=(48, 32))
    draw(folder / "b.jpg", size=(48, 32))
    draw(folder / "mask" / "a.png", size=(24, 16))
    draw(folder / "mask" / "b.png", size=(32, 48))
    draw(folder / "mask" / "lonely.png")
    found = scan(folder)
    assert [picture.mask for picture in found.pictures] == [str(folder / "mask" / f"{name}.png") for name in "ab"]
    assert told(found) == {
        "b.png": "this mask is 32x48, of other proportions than its picture",
        "lonely.png": "this mask belongs to no picture",
    }


def test_the_same_file_twice_is_told(folder):
    draw(folder / "a.png", tone=3)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    found = scan(folder)
    assert len(found.pictures) == 2 and told(found) == {"b.png": "the same file as a.png; it counts twice"}


def test_the_same_file_in_two_folders_is_told_with_its_folder(folder):
    draw(folder / "1_sks toy" / "a.png", tone=3)
    (folder / "2_zwx dog").mkdir()
    (folder / "2_zwx dog" / "a.png").write_bytes((folder / "1_sks toy" / "a.png").read_bytes())
    said = [problem.message for problem in scan(folder).problems]
    assert any(message.startswith("the same file as ../1_sks toy/a.png") for message in said)


def test_what_was_changed_on_the_way_is_told(folder):
    folder.mkdir()
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(folder / "a.png")
    assert told(scan(folder)) == {"a.png": "transparent; put on white"}
