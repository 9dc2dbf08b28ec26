"""`persona score` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from persona.core.host.descriptor import Descriptor
from persona.core.host.hooks import hookimpl

ROBOT = Path(__file__).parents[2] / "persona/assets/subjects/robot"


class Redness:
    """A scorer that can be checked by hand: how red a picture is, and how near its red is to the references'."""

    name = "redness"
    summary = "how red"
    figures = MappingProxyType({"red": "mean red", "near": "1 - distance to the references' mean red"})

    def __init__(self, model: str = "", device: str = "auto") -> None:
        self.asked = []

    def score(self, pictures, *, references=(), prompts=()):
        red = np.array([picture[..., 0].mean() / 255 for picture in pictures])
        found = {}
        if len(references):
            found["near"] = 1 - abs(red - np.mean([one[..., 0].mean() / 255 for one in references]))
        if prompts:
            found["red"] = np.where([prompt.startswith("red") for prompt in prompts], red, np.nan)
        return found


class Plugin:
    """Gives it."""

    @hookimpl
    def persona_scorers(self):
        return [Descriptor("redness", "how red", f"{__name__}:Redness")]


@pytest.fixture
def redness(plugged) -> None:
    plugged(redness=lambda: Plugin())


def paint(path: Path, red: int, words: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    information = PngInfo()
    for key, value in (words or {}).items():
        information.add_text(key, value)
    Image.new("RGB", (16, 16), (red, 0, 0)).save(path, pnginfo=information)
    return path


def test_a_table_of_one_folder_has_a_row_a_picture(persona_, redness, tmp_path) -> None:
    paint(tmp_path / "made/a.png", 255, {"persona": json.dumps({"prompt": "red one"})})
    paint(tmp_path / "made/b.png", 51, {"parameters": "red two\nNegative prompt: x\nSteps: 3"})
    paint(tmp_path / "made/c.png", 102)
    paint(tmp_path / "real/a.png", 204)
    answer = persona_("score", tmp_path / "made", "--reference", tmp_path / "real", "--scorer", "redness")
    assert answer.code == 0, answer.err
    rows = [line.split() for line in answer.out.splitlines()]
    assert rows == [
        ["picture", "near", "red", "prompt"],
        ["a.png", "0.800", "1.000", "red", "one"],
        ["b.png", "0.400", "0.200", "red", "two"],
        ["c.png", "0.600", "-"],
        ["mean", "of", "3", "0.600", "0.600"],
    ]


def test_several_folders_are_told_by_their_means_and_json_tells_all(persona_, redness, tmp_path) -> None:
    paint(tmp_path / "one/a.png", 255)
    paint(tmp_path / "one/b.png", 0)
    paint(tmp_path / "two/a.png", 51)
    typed = ("score", tmp_path / "one", tmp_path / "two", "--prompt", "my sks thing", "--replace", "my sks=red")
    typed = (*typed, "--scorer", "redness")
    rows = [line.split() for line in persona_(*typed).out.splitlines()]
    assert rows[0] == ["folder", "red", "pictures"]
    assert [row[1:] for row in rows[1:]] == [["0.500", "2"], ["0.200", "1"]]
    told = json.loads(persona_(*typed, "--json").out)
    assert (told["scorer"], told["model"]) == ("redness", "embedded")
    assert [one["means"] for one in told["folders"]] == [{"red": 0.5}, {"red": 0.2}]
    assert told["folders"][0]["pictures"][0] == {
        "path": str(tmp_path / "one/a.png"), "prompt": "red thing", "red": 1.0,
    }  # fmt: skip


def test_captions_beside_pictures_go_before_what_the_file_says(persona_, redness, tmp_path) -> None:
    paint(tmp_path / "made/a.png", 255, {"prompt": "red by the file"})
    paint(tmp_path / "made/b.png", 255, {"prompt": "red by the file"}).with_suffix(".txt").write_text("red by hand")
    paint(tmp_path / "made/c.png", 255, {"prompt": '{"3": {"class_type": "KSampler"}}'})
    told = json.loads(persona_("score", tmp_path / "made", "--scorer", "redness", "--json").out)
    assert [one["prompt"] for one in told["folders"][0]["pictures"]] == ["red by the file", "red by hand", ""]
    assert [one["red"] for one in told["folders"][0]["pictures"]] == [1.0, 1.0, None]


def test_a_run_is_judged_by_its_samples_against_its_own_pictures(persona_, redness, tmp_path) -> None:
    pictures = tmp_path / "data"
    for number in range(2):
        paint(pictures / f"{number}.png", 200 + number)
    run = tmp_path / "run"
    answer = persona_(
        "train", "--plugin", "dreambooth", "--data", pictures, "--token", "sks", "--class", "robot", "--steps", "1",
        "--sample-prompt", "red sks robot", "--sample-every", "1", "--sample-steps", "1", "--output", run,
        "--prior-weight", "0", "--batch", "1",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    answer = persona_("score", run, "--scorer", "redness", "--json")
    assert "2 training pictures" in answer.err
    told = json.loads(answer.out)
    assert [Path(one["folder"]).name for one in told["folders"]] == ["step-000000", "step-000001"]
    for folder in told["folders"]:
        assert [one["prompt"] for one in folder["pictures"]] == ["red sks robot"]
        (made,) = folder["pictures"]
        red = np.asarray(Image.open(made["path"]))[..., 0].mean() / 255
        assert made["red"] == pytest.approx(red, abs=1e-5)
        assert made["near"] == pytest.approx(1 - abs(red - 200.5 / 255), abs=1e-5)


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    [
        (["score", "nowhere"], 1, "does not exist"),
        (["score", "{made}"], 2, "nothing to judge"),
        (["score", "{made}", "--prompt", "x", "--scorer", "clipp"], 2, "Did you mean clip"),
        (["score", "{made}", "--prompt", "x", "--model", "{made}"], 1, "is not a CLIP that can judge"),
        (["score", "{made}", "--prompt", "x", "--replace", "sks"], 2, "WORD=TEXT"),
        (["score", "{made}", "--reference", "{made}/none"], 1, "does not exist"),
        (["score"], 2, "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_a_line(persona_, tmp_path, typed, code, words) -> None:
    pytest.importorskip("torch")
    paint(tmp_path / "made/a.png", 255)
    answer = persona_(*(word.format(made=tmp_path / "made") for word in typed))
    assert answer.code == code
    assert words in answer.err and "Traceback" not in answer.err
    assert len(answer.err.splitlines()) <= 2


def test_the_embedded_judge_tells_the_robot_from_what_is_none(persona_, tmp_path) -> None:
    pytest.importorskip("transformers")
    paint(tmp_path / "red/a.png", 200)
    typed = (
        "score",
        ROBOT,
        tmp_path / "red",
        "--reference",
        ROBOT,
        "--prompt",
        "a robot on a red background",
        "--json",
    )
    answer = persona_(*typed)
    assert answer.code == 0, answer.err
    assert "are references themselves" in answer.err
    robots, plain = json.loads(answer.out)["folders"]
    assert robots["means"]["subject_similarity"] > plain["means"]["subject_similarity"] + 0.2
    by_name = {Path(one["path"]).stem: one["prompt_fidelity"] for one in robots["pictures"]}
    assert max(by_name, key=by_name.__getitem__) == "robot-red"
