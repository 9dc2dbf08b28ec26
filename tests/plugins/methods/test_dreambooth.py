"""Plans of DreamBooth: subjects, captions, classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from persona.core.host.errors import UsageError
from persona.core.training.plan import LowRank, Picture, Weights
from persona.core.training.settings import TrainSettings
from persona.hub.bases import open_base
from persona.plugins.methods.dreambooth import DreamBooth, DreamBoothOptions

BARE = Picture("/photos/one.png", ())


@pytest.fixture(scope="module")
def mini() -> Any:
    return open_base("mini")


def plan(base: Any, *pictures: Picture, **options: Any) -> Any:
    return DreamBooth().plan(DreamBoothOptions(**options), TrainSettings(), base, pictures or (BARE,))


def test_one_subject_with_its_class_beside_it(mini: Any) -> None:
    made = plan(mini, class_word="robot", prior_weight=0.5, class_pictures=7)
    instance, prior = made.streams
    assert instance.pictures[0].captions == ("a sks robot",)
    assert (prior.generated.prompt, prior.generated.count, prior.weight) == ("a robot", 7, 0.5)
    assert isinstance(made.trains[0], Weights) and made.metadata["trigger"] == "sks robot"


def test_every_picture_keeps_a_caption_of_its_own(mini: Any) -> None:
    told = Picture("/photos/two.png", ("a {token} {class} on the moon", "my sks"))
    first, second = plan(mini, BARE, told, class_word="dog").streams[0].pictures
    assert first.captions == ("a sks dog",) and second.captions == ("a sks dog on the moon", "my sks")
    with pytest.raises(UsageError, match="does not contain the word 'sks'"):
        plan(mini, Picture("/photos/x.png", ("a dog",)), class_word="dog")


def test_kohyas_folders_are_several_subjects_in_one_run(mini: Any) -> None:
    """bmaltais/kohya_ss#3374 and others: N_name folders. A picture's subject is its folder's name."""
    made = plan(
        mini,
        Picture("/data/20_sks robot/a.png", ("sks robot",), repeats=20),
        Picture("/data/5_zwx cat/b.png", ("a zwx cat asleep",), repeats=5),
        Picture("/data/5_zwx cat/c.png", ("zwx cat",), repeats=5),
        prior_weight=0.8,
    )
    instance, robots, cats = made.streams
    assert [picture.captions for picture in instance.pictures] == [("sks robot",), ("a zwx cat asleep",), ("zwx cat",)]
    assert [picture.repeats for picture in instance.pictures] == [20, 5, 5]
    assert [(s.name, s.generated.prompt) for s in (robots, cats)] == [
        ("class robot", "a robot"),
        ("class cat", "a cat"),
    ]
    assert robots.weight + cats.weight == pytest.approx(0.8), "the prior weighs what it was told, for any number"
    assert made.metadata["trigger"] == "sks robot, zwx cat"


def test_own_class_pictures_of_several_classes_lie_in_folders_of_their_names(mini: Any, tmp_path: Path) -> None:
    """d8ahazard/sd_dreambooth_extension#265: may I bring my own class images?"""
    (tmp_path / "1_cat").mkdir()
    pictures = (Picture("/d/1_sks robot/a.png", ("sks robot",)), Picture("/d/1_zwx cat/b.png", ("zwx cat",)))
    robots, cats = plan(mini, *pictures, class_data=str(tmp_path)).streams[1:]
    assert robots.generated.folder is None and cats.generated.folder == str(tmp_path / "1_cat")
    assert plan(mini, class_word="cat", class_data="/own").streams[1].generated.folder == "/own"


def test_a_folder_without_a_class_is_refused_in_words(mini: Any) -> None:
    with pytest.raises(UsageError, match="names no class behind its word"):
        plan(mini, Picture("/data/20_sks/a.png", ("sks",)))


def test_deltas_take_every_option_of_lora(mini: Any) -> None:
    part = plan(mini, class_word="robot", lora=True, rank=4, decomposed=True, conv_rank=2).trains[0]
    assert isinstance(part, LowRank) and part.rank == 4 and part.decomposed and set(part.ranks.values()) == {2}


def test_an_option_of_deltas_without_deltas_is_refused(mini: Any) -> None:
    with pytest.raises(UsageError, match="--rank is an option of deltas") as refused:
        plan(mini, class_word="robot", rank=4)
    assert refused.value.hint == "Add --lora"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "what kind of thing"),
        ({"class_word": "robot", "instance_prompt": "a robot"}, "does not contain the word 'sks'"),
        ({"class_word": "robot", "class_prompt": "a sks robot"}, "contains the subject's word"),
    ],
)
def test_prompts_that_contradict_what_is_learned_are_refused(mini: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(mini, **options)
