"""Templates, sidecars and the metadata tables that people bring from other trainers."""

import json

import pytest

from persona.core.host.errors import DataError, UsageError
from persona.core.training.captions import (
    TEMPLATES,
    Row,
    alternatives,
    fill,
    read_metadata,
    read_sidecar,
    sidecar_of,
    templates_for,
)


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_object_and_style_templates_are_those_of_textual_inversion():
    """examples/textual_inversion/textual_inversion.py of diffusers lists 27 and, two of them twice, 19 sentences."""
    assert (len(TEMPLATES["object"]), len(set(TEMPLATES["style"]))) == (27, 17)
    assert "a photo of a {}" in TEMPLATES["object"] and "a painting in the style of {}" in TEMPLATES["style"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_names_the_placeholder_once(name):
    filled = templates_for(name, "<cat-toy>")
    assert all(caption.split().count("<cat-toy>") == 1 and "{" not in caption for caption in filled)
    assert len(set(filled)) == len(filled)


def test_an_unknown_list_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="style"):
        templates_for("styles", "<x>")


def test_a_template_needs_no_spaces_but_a_place():
    assert fill("{}的照片", "α猫") == "α猫的照片"
    assert fill("{} and {}", "<x>") == "<x> and <x>"
    with pytest.raises(UsageError, match=r"has no \{\}"):
        fill("a photo of a dog", "<x>")


def test_a_sidecar_has_the_pictures_name(written, tmp_path):
    picture = tmp_path / "my.dog.jpg"
    assert sidecar_of(picture) is None
    caption = written("my.dog.caption", "a")
    assert sidecar_of(picture) == caption
    text = written("my.dog.txt", "b")
    assert sidecar_of(picture) == text


def test_every_line_of_a_sidecar_is_a_caption(written):
    assert read_sidecar(written("a.txt", "\ufeffa sks dog\r\n\r\n  α猫 插画风格 \n")) == ("a sks dog", "α猫 插画风格")
    assert read_sidecar(written("b.txt", "\n")) == ()


def test_text_in_another_encoding_is_named(written):
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8") as raised:
        read_sidecar(written("a.txt", "一只可爱的狗".encode("gbk")))
    assert "iconv" in raised.value.hint


def test_a_caption_file_of_megabytes_is_refused(written):
    with pytest.raises(DataError, match="too large for a caption"):
        read_sidecar(written("a.txt", b"x" * 2_000_000))


def test_jsonl_of_the_hub_and_of_data_juicer(written):
    """Rows as Hugging Face's imagefolder has them, and as Data-Juicer writes them (a list of absolute paths, marks)."""
    rows = [
        {"file_name": "0.jpg", "text": "a photo of a dog"},
        {"text": "二次元", "image": ["/abs/path/0.jpg"]},
        {"text": "<__dj__image> red <|__dj__eoc|>", "images": ["a/1.png", "a/2.png"]},
        {"file_name": "3.jpg", "captions": ["one", "two"], "width": 512},
    ]
    content = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    assert read_metadata(written("metadata.jsonl", content)) == (
        Row("0.jpg", ("a photo of a dog",), 1),
        Row("/abs/path/0.jpg", ("二次元",), 3),
        Row("a/1.png", ("red",), 5),
        Row("a/2.png", ("red",), 5),
        Row("3.jpg", ("one", "two"), 7),
    )


def test_csv_with_a_byte_order_mark_quotes_and_line_breaks(written):
    """pandas' to_csv(encoding="utf-8-sig"), as the Kolors LoRA notebooks write metadata.csv."""
    content = '\ufefffile_name,text\r\n0.jpg,二次元\r\n1.jpg,"red, ""round""\nand small"\r\n2.jpg,\r\n'
    assert read_metadata(written("metadata.csv", content)) == (
        Row("0.jpg", ("二次元",), 2),
        Row("1.jpg", ('red, "round"\nand small',), 4),
        Row("2.jpg", (), 5),
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", '{"file_name": "0.jpg", "text": "a"}\n{oops', "line 2 is not JSON"),
        ("metadata.jsonl", '["0.jpg", "a"]', "line 1 is not a JSON object"),
        ("metadata.jsonl", '{"file_name": "0.jpg", "txt": "a"}', "has no text or caption .*; it has file_name, txt"),
        ("metadata.jsonl", '{"file_name": 3, "text": "a"}', "'file_name' is neither text nor"),
        ("metadata.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("metadata.csv", "name,text\n0.jpg,a\n", "line 2 has no file_name or image"),
        ("metadata.csv", "file_name,text\n0.jpg,red, round\n", "line 2 has more columns"),
        ("metadata.csv", 'file_name,text\n0.jpg,"a', "is not CSV"),
        ("metadata.csv", "文件,描述\n".encode("gbk"), "is not UTF-8"),
    ],
)
def test_a_broken_table_is_told_with_its_line(written, name, content, words):
    with pytest.raises(DataError, match=words):
        read_metadata(written(name, content))


def test_alternatives_take_every_choice_in_order() -> None:
    assert alternatives("a {red|blue} hat on {a|the} dog") == (
        "a red hat on a dog",
        "a red hat on the dog",
        "a blue hat on a dog",
        "a blue hat on the dog",
    )
    assert alternatives("a robot{| on snow}") == ("a robot", "a robot on snow")
    assert alternatives("a {token} {class}") == ("a {token} {class}",)
