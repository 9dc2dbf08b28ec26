"""`persona train` as it is typed: runs on a tiny base, and every mistake answered in one clear line."""

import csv
import errno
import json
import os
import resource
import shutil

import numpy as np
import pytest
from PIL import Image

QUICK = ["--batch", 1, "--sample-steps", 1, "--rank", 2]
LORA = ["--plugin", "lora", "--prompt", "a toy", *QUICK]
DREAMBOOTH = ["--plugin", "dreambooth", "--class", "toy", "--class-pictures", 2, "--lora", *QUICK]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test is typed in a folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_sd1):
    """A finished run of four steps with its data; tests copy it before they change it."""
    from persona.cli import run

    folder = tmp_path_factory.mktemp("made")
    draw(folder / "data", 3)
    words = ["train", *LORA, "--data", folder / "data", "--base", tiny_sd1, "--output", folder / "run"]
    words += ["--steps", 4, "--save-every", 2, "--learning-rate", 1e-2, "--title", "toys"]
    assert run([str(word) for word in words]) == 0
    return folder / "run"


@pytest.fixture
def copied(made, tmp_path):
    """The finished run, to be changed."""
    return shutil.copytree(made, tmp_path / "run")


def draw(folder, count):
    folder.mkdir()
    for number in range(count):
        drawn = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(drawn).save(folder / f"toy-{number}.png")
    return folder


def metrics(run):
    with (run / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def assert_refused(answer, code, *said, hint=""):
    """One error line with these words, one line with what to type, nothing else."""
    assert answer.code == code, answer.err
    lines = answer.err.splitlines()
    error = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    for words in said:
        assert words in lines[error], answer.err
    assert len(lines) == error + 2, answer.err
    assert lines[-1].startswith("  "), answer.err
    assert hint in lines[-1], answer.err
    assert "Traceback" not in answer.err


# -- pictures and captions -----------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_has_no_pictures(persona_, tmp_path, tiny_sd1):
    draw(tmp_path / "my-toys", 1)
    answer = persona_("train", *LORA, "--data", tmp_path / "my-toy", "--base", tiny_sd1)
    assert_refused(answer, 1, "my-toy does not exist", hint=f"Did you mean --data {tmp_path / 'my-toys'}?")
    (tmp_path / "empty").mkdir()
    answer = persona_("train", *LORA, "--data", tmp_path / "empty", "--base", tiny_sd1)
    assert_refused(answer, 1, "empty has no pictures", hint="Name a folder with JPEG, PNG or WebP files: --data DIR")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_folder_of_folders_is_answered_with_the_one_that_was_meant(persona_, tmp_path, tiny_sd1):
    (tmp_path / "all").mkdir()
    draw(tmp_path / "all" / "toys", 2)
    answer = persona_("train", *LORA, "--data", tmp_path / "all", "--base", tiny_sd1)
    assert_refused(answer, 1, "its sub-folder toys has 2", hint=f"--data {tmp_path / 'all' / 'toys'}")


def test_pictures_that_cannot_be_read_are_told_and_left_out_or_refused_when_all_are(persona_, tmp_path, tiny_sd1):
    data = draw(tmp_path / "data", 1)
    (data / "torn.jpg").write_bytes((data / "toy-0.png").read_bytes()[:99])
    answer = persona_("train", *LORA, "--data", data, "--base", tiny_sd1, "--steps", 1)
    assert answer.code == 0
    assert answer.err.count(f"{data / 'torn.jpg'} is left out: ") == 1
    (data / "toy-0.png").unlink()
    answer = persona_("train", *LORA, "--data", data, "--base", tiny_sd1)
    assert_refused(answer, 1, "Nothing of", "(1 tried)", "torn.jpg", hint="persona data check")


def test_a_caption_or_prompt_without_the_word_that_is_learned(persona_, toys, tiny_sd1):
    common = ["--data", toys, "--base", tiny_sd1]
    answer = persona_("train", *DREAMBOOTH, *common, "--instance-prompt", "a toy")
    assert_refused(answer, 2, "'a toy' does not contain the word 'sks'", hint='--instance-prompt "a sks toy"')
    (toys / "toy-1.txt").write_text("a toy on a table")
    answer = persona_("train", *DREAMBOOTH, *common)
    assert_refused(answer, 2, "The caption 'a toy on a table' of", "toy-1.png", "'sks'", hint="{token}")
    answer = persona_("train", "--plugin", "lora", *QUICK, *common)
    assert_refused(answer, 2, "2 of 3 pictures have no caption", hint='--prompt "a photo of …"')
    answer = persona_("train", "--plugin", "dreambooth", *common)
    assert_refused(answer, 2, "what kind of thing the subject is", hint="--class robot")


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "said", "hint"),
    [
        (["--alpha", 0], "alpha 0 would switch the adapter off", "--alpha 2"),
        (["--rank", 33], "Rank 33 is above the width 32 of unet.down_blocks.1.", "--rank 32"),
        (["--rank", 0], "--rank 0 is too small", "--rank 1"),
        (["--target", "to_qq"], "The target to_qq names no module of unet. Did you mean to_q", "--target to_q"),
        (["--target", "attn1.to_kk"], "Did you mean attn1.to_k", "--target to_q"),
        (["--schedule", "cosin"], "--schedule cosin is not known", "--schedule cosine"),
        (["--precision", "fp23"], "It is one of: fp32, bf16, fp16", "--precision"),
        (["--steps", "ten"], "'ten' is not a valid integer", "persona train --help"),
        (["--stepss", 3], "No such option '--stepss'. (Did you mean", "persona train --help"),
        (["--device", "gpu"], 'no device called "gpu"', "cuda"),
        (["--device", "cuda:77"], "cuda:77 was asked for, and here there is only", "--device"),
        (["--backend", "torc"], "There is no backend called torc. Did you mean torch?", "persona plugins"),
        (["--caption-dropout", 1.5], "--caption-dropout 1.5 is too large", "--caption-dropout 1"),
        (["steps=many"], "steps=many: --steps 'many' is not a whole number", "--steps 10"),
        (["stepz=3"], "stepz=3: unknown key stepz", "Did you mean steps?"),
        (["steps=3", "what"], "'what' is not of the form key=value", "steps=500"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_an_option_that_cannot_be_is_answered_with_one_that_can(persona_, toys, tiny_sd1, tmp_path, typed, said, hint):
    answer = persona_("train", *LORA, "--data", toys, "--base", tiny_sd1, *typed)
    assert_refused(answer, 1 if "cuda:77" in typed else 2, said, hint=hint)
    assert [path.name for path in (tmp_path / "here").rglob("*") if path.is_file()] == []


def test_an_unknown_method_and_no_method(persona_):
    answer = persona_("train", "--plugin", "dreamboth")
    assert_refused(answer, 2, "There is no method called dreamboth. Did you mean dreambooth?", hint="persona plugins")
    assert_refused(persona_("train"), 2, "No method is named. There are: lora, dreambooth", hint="--plugin dreambooth")


def test_a_recipe_with_an_unknown_key_a_wrong_value_or_no_yaml_is_answered_with_its_line(persona_, tmp_path):
    recipe = tmp_path / "my.yaml"
    for text, said, hint in [
        ("method: dreambooth\nclass_word: toy\n\nstepps: 3\n", "line 4: unknown key stepps", "Did you mean steps?"),
        ("method: lora\nqqqqq: 3\n", "line 2: unknown key qqqqq", "Known keys: accelerate_config, accumulation, "),
        ("method: lora\nsteps: soon\n", "line 2: --steps 'soon' is not a whole number", "--steps 10"),
        ("method: lora\nsteps: 0\n", "line 2: --steps 0 is too small", "--steps 1"),
        ("method: lora\nrandom_flip: 3\n", "line 2: --random-flip 3 is not true or false", "--no-random-flip"),
        ("method: lora\nmethod: full\n", "line 2: method is given twice (first in line 1)", ""),
        ("- a\n", "a recipe is a list of 'key: value' lines", "method: dreambooth"),
        ("method: [lora\nsteps: 3\n", "line 2: not valid YAML", ""),
    ]:
        recipe.write_text(text)
        answer = persona_("train", recipe)
        assert answer.code == 2
        assert f"error: {recipe}" in answer.err
        assert said in answer.err
        assert hint in answer.err
        assert "Traceback" not in answer.err
    assert_refused(persona_("train", tmp_path / "none.yaml"), 2, "There is no recipe", hint="--plugin METHOD")


# -- bases ---------------------------------------------------------------------------------------------------------


def changed_base(tiny_sd1, folder, change):
    """A copy of the tiny base whose UNet's tensors were changed by a function."""
    from safetensors.numpy import load_file, save_file

    base = shutil.copytree(tiny_sd1, folder)
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return base


def test_a_base_with_missing_or_extra_weights_is_refused_by_name(persona_, toys, tiny_sd1, tmp_path):
    for name, change, said in [
        ("less", lambda tensors: tensors.pop("conv_in.bias"), "unet has no conv_in.bias"),
        ("more", lambda tensors: tensors.update({"conv_on.bias": np.zeros(4, "f4")}), "nobody knows: conv_on.bias"),
        ("other", lambda tensors: tensors.update({"conv_in.bias": np.zeros(4, "f4")}), "unet's conv_in.bias is [4]"),
    ]:
        base = changed_base(tiny_sd1, tmp_path / name, change)
        answer = persona_("train", *LORA, "--data", toys, "--base", base, "--output", tmp_path / "run")
        assert_refused(answer, 1, said)
        assert not (tmp_path / "run").exists()


def test_a_base_that_is_none(persona_, toys, tmp_path):
    draw(tmp_path / "pictures", 1)
    answer = persona_("train", *LORA, "--data", toys, "--base", tmp_path / "pictures")
    assert_refused(answer, 1, "it is not a diffusers folder", hint="--base mini")
    answer = persona_("train", *LORA, "--data", toys, "--base", "minni")
    assert_refused(answer, 1, "There is no base model minni", "Did you mean mini", hint="--base mini")


# -- places that cannot be written, memory, losses -----------------------------------------------------------------


def test_an_output_that_is_taken_or_cannot_be_written(persona_, toys, tiny_sd1, made, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    common = ["train", *LORA, "--data", toys, "--base", tiny_sd1, "--output"]
    assert_refused(persona_(*common, tmp_path / "file"), 1, "file is a file", hint="--output FOLDER")
    assert_refused(
        persona_(*common, tmp_path / "file" / "run"), 1, "cannot be written: Not a directory", hint="--output"
    )
    assert_refused(persona_(*common, tmp_path / "full"), 1, "is there already and not empty", hint="--output FOLDER")
    assert_refused(persona_(*common, made), 1, "not empty", hint=f"persona train --resume {made}")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_that_is_read_only_is_named(persona_, toys, tiny_sd1, tmp_path, monkeypatch, number):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number), str(tmp_path / "run"))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    answer = persona_("train", *LORA, "--data", toys, "--base", tiny_sd1, "--output", tmp_path / "run")
    assert_refused(answer, 1, f"cannot be written: {os.strerror(number)}", hint="--output FOLDER")


def test_a_full_disk_loses_nothing_that_was_saved_and_the_run_goes_on_after(persona_, copied, made, tmp_path):
    before = (copied / "checkpoints" / "step-000004" / "state.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        answer = persona_("train", "--resume", copied, "--steps", 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_refused(
        answer, 1, "The disk takes no file as large as this", "step-000006", "What was saved before is whole",
        hint=f"Make room, then go on with: persona train --resume {copied}",
    )  # fmt: skip
    assert (copied / "checkpoints" / "step-000004" / "state.safetensors").read_bytes() == before
    assert {path.name for path in (copied / "checkpoints").iterdir()} == {"step-000002", "step-000004"}
    assert persona_("train", "--resume", copied).code == 0
    straight = tmp_path / "straight"
    assert persona_("train", made / "recipe.yaml", "steps=6", "--output", straight).code == 0
    assert (copied / "adapter.safetensors").read_bytes() == (straight / "adapter.safetensors").read_bytes()


def test_a_disk_without_space_is_called_full(persona_, toys, tiny_sd1, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    answer = persona_("train", *LORA, "--data", toys, "--base", tiny_sd1, "--output", tmp_path / "run")
    assert_refused(answer, 1, "The disk is full: ", "recipe.yaml was not written", hint="Make room")
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


def test_out_of_memory_says_what_to_lower_and_what_is_kept(persona_, copied, monkeypatch):
    from persona.plugins.backends.torch.session import TorchSession

    def too_much(*arguments):
        raise MemoryError

    monkeypatch.setattr(TorchSession, "_conditioning", too_much)
    answer = persona_("train", "--resume", copied, "--steps", 6)
    assert_refused(
        answer, 1, "Step 5 of 6: Out of memory", f"The last good checkpoint is kept: {copied}/checkpoints/step-000004",
        hint="Lower --batch (and raise --accumulation)",
    )  # fmt: skip
    assert "--gradient-checkpointing" in answer.err
    assert f"Go on with: persona train --resume {copied} … --allow-change" in answer.err


def test_a_run_that_comes_apart_stops_says_the_step_and_keeps_the_last_good_checkpoint(persona_, copied):
    answer = persona_("train", "--resume", copied, "--steps", 8, "--learning-rate", 1e30, "--allow-change")
    assert "changed: trains[0].learning_rate was 0.01, is 1e+30" in answer.err
    assert_refused(
        answer, 1, "Step 6 of 8: The loss is not finite (learning rate 1e+30",
        f"The last good checkpoint is kept: {copied}/checkpoints/step-000004",
        hint=f"persona train --resume {copied} --learning-rate 0.0001 --allow-change",
    )  # fmt: skip
    assert [row["step"] for row in metrics(copied)] == ["1", "2", "3", "4", "5"]
    answer = persona_("train", "--resume", copied, "--learning-rate", 0.0001, "--allow-change")
    assert answer.code == 0, answer.err
    assert [row["step"] for row in metrics(copied)] == [str(step) for step in range(1, 9)]
    assert all(np.isfinite(float(row["loss"])) for row in metrics(copied))


def test_a_checkpoint_that_the_next_step_cannot_use_is_not_gone_on_from(persona_, toys, tiny_sd1, tmp_path):
    run = tmp_path / "run"
    typed = ["--data", toys, "--base", tiny_sd1, "--output", run, "--steps", 3, "--save-every", 1]
    answer = persona_("train", *LORA, *typed, "--sample-every", 3, "--learning-rate", 1e30)
    assert_refused(answer, 1, "Step 2 of 3: The loss is not finite", "There is no checkpoint before it")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["unusable-step-000001"]
    assert persona_("train", "--resume", run, "--learning-rate", 1e-3, "--allow-change").code == 0
    left = {path.name for path in (*run.iterdir(), *(run / "checkpoints").iterdir())}
    assert not any(name.startswith((".", "unusable")) for name in left), "nothing of it is left lying about"


def test_samples_that_come_apart_are_the_runs_fault_and_not_the_bases(persona_, toys, tiny_sd1, tmp_path):
    typed = ["--data", toys, "--base", tiny_sd1, "--output", tmp_path / "run", "--steps", 3, "--sample-every", 1]
    answer = persona_("train", *LORA, *typed, "--learning-rate", 1e30)
    assert_refused(answer, 1, "Step 1 of 3: What the denoiser made is not finite", hint="--learning-rate 0.0001")


# -- resuming ------------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_how_to_train_it_further(persona_, made):
    answer = persona_("train", "--resume", made)
    assert_refused(answer, 1, "is finished: 4 steps", hint=f"persona train --resume {made} --steps 104")
    answer = persona_("train", "--resume", made, "--steps", 3)
    assert_refused(answer, 1, "has made 4 steps already, more than 3", hint="--steps 104")


def test_trained_further_it_equals_a_run_that_was_longer_from_the_start(persona_, copied, made, tmp_path):
    assert persona_("train", "--resume", copied, "--steps", 7).code == 0
    straight = tmp_path / "straight"
    assert persona_("train", made / "recipe.yaml", "--steps", 7, "--output", straight).code == 0
    assert (copied / "adapter.safetensors").read_bytes() == (straight / "adapter.safetensors").read_bytes()
    assert metrics(copied) == metrics(straight)


def test_a_schedule_that_ends_elsewhere_is_told_when_a_run_is_trained_further(persona_, made, tmp_path):
    run = tmp_path / "run"
    assert persona_("train", made / "recipe.yaml", "schedule=cosine", "steps=2", "--output", run).code == 0
    answer = persona_("train", "--resume", run, "--steps", 3)
    assert answer.code == 0
    assert "the learning-rate schedule cosine is now spread over 3 steps, not 2" in answer.err


def test_other_options_data_or_base_are_named_and_refused_unless_allowed(persona_, copied, made, tiny_sd1, tmp_path):
    go_on = ["train", "--resume", copied, "--steps", 6]
    answer = persona_(*go_on, "--seed", 3)
    assert_refused(answer, 1, "was started with something else: seed was 0, is 3.", hint="--allow-change")
    answer = persona_(*go_on, "--learning-rate", 1e-4, "--caption-dropout", 0.5)
    assert_refused(answer, 1, "trains[0].learning_rate was 0.01, is 0.0001", "caption_dropout was 0.0, is 0.5")

    data = shutil.copytree(made.parent / "data", tmp_path / "data")
    Image.new("RGB", (64, 64)).save(data / "toy-1.png")
    (data / "toy-2.png").unlink()
    answer = persona_(*go_on, "--data", data)
    assert_refused(answer, 1, "toy-1.png.sha256 was", "toy-2.png is gone", hint="--allow-change")

    base = changed_base(
        tiny_sd1, tmp_path / "base", lambda tensors: tensors.update(conv_in=tensors.pop("conv_in.bias"))
    )
    answer = persona_(*go_on, "--base", base)
    assert_refused(answer, 1, "digest", "is now", hint="--allow-change")

    answer = persona_(*go_on, "--data", data, "--allow-change")
    assert answer.code == 0, answer.err
    assert "toy-2.png is gone" in answer.err


def test_the_same_pictures_in_another_place_are_the_same_pictures(persona_, copied, made, tmp_path):
    data = shutil.copytree(made.parent / "data", tmp_path / "moved")
    assert persona_("train", "--resume", copied, "--steps", 5, "--data", data).code == 0


def test_a_checkpoint_of_another_shape_cannot_be_allowed(persona_, copied):
    answer = persona_("train", "--resume", copied, "--steps", 6, "--rank", 3, "--allow-change")
    assert answer.code == 1
    assert "The checkpoint does not fit this run: value/unet." in answer.err


def test_a_damaged_checkpoint_is_named_with_the_way_round_it(persona_, copied):
    newest = copied / "checkpoints" / "step-000004"
    (newest / "state.safetensors").write_bytes(b"torn")
    answer = persona_("train", "--resume", copied, "--steps", 6)
    assert_refused(answer, 1, f"The checkpoint {newest} cannot be read", hint=f"rm -r {newest}")
    shutil.rmtree(newest)
    assert persona_("train", "--resume", copied, "--steps", 6).code == 0


def test_what_is_no_run_is_answered_with_one_that_is(persona_, copied, tmp_path):
    answer = persona_("train", "--resume", tmp_path / "rum")
    assert_refused(answer, 1, "There is no run", hint=f"Did you mean --resume {copied}?")
    (tmp_path / "none").mkdir()
    answer = persona_("train", "--resume", tmp_path / "none")
    assert_refused(answer, 1, "is not a run: it has no recipe.yaml")


def test_another_method_or_place_would_be_another_run(persona_, made):
    answer = persona_("train", "--resume", made, "--plugin", "full")
    assert_refused(answer, 2, f"{made} is a run of lora, not of full", hint="Leave --plugin out")
    answer = persona_("train", "--resume", made, "--output", "elsewhere")
    assert_refused(answer, 2, "--output has no place beside it", hint=f"cp -r {made} elsewhere")


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(persona_, toys, tiny_sd1, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "file" / "cache"))
    typed = ["--data", toys, "--base", tiny_sd1, "--output", tmp_path / "run", "--steps", 1]
    answer = persona_("train", *DREAMBOOTH, *typed)
    assert_refused(answer, 1, "cannot be written: Not a directory", hint="export PERSONA_CACHE=FOLDER")


# -- recipes -------------------------------------------------------------------------------------------------------


def test_the_recipe_of_a_run_trains_to_the_same_bytes_from_anywhere(persona_, made, tmp_path):
    answer = persona_("train", made / "recipe.yaml", "--output", tmp_path / "again")
    assert answer.code == 0
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (made / "adapter.safetensors").read_bytes()
    assert (tmp_path / "again" / "recipe.yaml").read_text() == (made / "recipe.yaml").read_text()


def test_persona_yaml_of_this_folder_is_used_and_said_and_what_is_typed_wins(persona_, tmp_path, tiny_sd1):
    draw(tmp_path / "here" / "pictures", 2)
    (tmp_path / "here" / "persona.yaml").write_text(
        f"method: lora\nbase: {tiny_sd1}\ndata: pictures\nprompt: a toy\nsteps: 50\nrank: 3\nbatch: 2\n"
    )
    figures = persona_("train", "--dry-run", "--json")
    assert figures.code == 0, figures.err
    lines = figures.out.splitlines()
    assert json.loads(lines[0]) == {"event": "Note", "text": "using persona.yaml of this folder"}
    told = json.loads("\n".join(lines[1:]))
    assert (told["method"], told["steps"], told["samples_per_step"], told["pictures"]) == (
        "lora",
        50,
        2,
        {"pictures": 2},
    )
    told = persona_("train", "steps=7", "--batch", 5, "--dry-run")
    assert "steps          7 of 5 samples" in told.out
    assert "using persona.yaml of this folder" in told.err
    assert "steps          7 of 1" in persona_("train", "steps=7", "batch=5", "--batch", 1, "--dry-run").out


def test_a_persona_yaml_without_a_method_is_for_every_method(persona_, tmp_path, tiny_sd1, toys):
    (tmp_path / "here" / "persona.yaml").write_text(f"steps: 50\nbase: {tiny_sd1}\n")
    answer = persona_("train", "--plugin", "lora", "--data", toys, "--prompt", "x", "--dry-run")
    assert answer.code == 0, answer.err
    assert "steps          50" in answer.out
    assert "using persona.yaml of this folder" in answer.err


def test_a_typed_method_that_persona_yaml_is_not_for_leaves_it_aside_and_says_so(persona_, tmp_path, tiny_sd1, toys):
    (tmp_path / "here" / "persona.yaml").write_text("method: lora\nprompt: a toy\nsteps: 50\n")
    answer = persona_("train", "--plugin", "full", "--data", toys, "--prompt", "x", "--base", tiny_sd1, "--dry-run")
    assert answer.code == 0, answer.err
    assert "persona.yaml of this folder is for lora, not full: it is not used" in answer.err
    assert "steps          50" not in answer.out


def test_folders_in_a_recipe_start_where_the_recipe_is(persona_, tmp_path, tiny_sd1):
    (tmp_path / "shared").mkdir()
    draw(tmp_path / "shared" / "toys", 2)
    draw(tmp_path / "shared" / "class", 4)
    shutil.copytree(tiny_sd1, tmp_path / "shared" / "base")
    (tmp_path / "shared" / "r.yaml").write_text(
        "method: dreambooth\ndata: toys\nclass_data: class\nbase: base\nclass_word: toy\nclass_pictures: 4\n"
    )
    told = persona_("train", tmp_path / "shared" / "r.yaml", "--dry-run", "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["base"] == str(tmp_path / "shared" / "base")


# -- what is shown -------------------------------------------------------------------------------------------------


def test_without_pictures_the_shipped_example_is_trained_on_mini_and_said_with_the_line_for_ones_own(persona_):
    answer = persona_("train", "--plugin", "dreambooth", "--dry-run")
    assert answer.code == 0, answer.err
    assert "no pictures were named: training the shipped example subject (robot) on mini." in answer.err
    assert "For your own: persona train --plugin dreambooth --data FOLDER --class WORD" in answer.err
    assert "pictures       5 instance, 64 class" in answer.out


def test_the_figures_of_a_dry_run_are_those_of_a_calculation_by_hand(persona_, toys, tiny_sd1):
    from safetensors.numpy import load_file

    typed = ["train", *DREAMBOOTH, "--data", toys, "--base", tiny_sd1, "--dry-run", "--json"]
    saving = ["--save-every", 2, "--keep-last", 4]  # after 2, 4, 6, 8 and 9 steps, of which four stay
    told = json.loads(persona_(*typed, "--steps", 9, "--batch", 2, "--accumulation", 3, *saving).out)
    shapes = {}
    for file in tiny_sd1.rglob("*.safetensors"):
        shapes |= {(file.parent.name, name): tensor.shape for name, tensor in load_file(file).items()}
    attention = [
        shape
        for (part, name), shape in shapes.items()
        if part == "unet" and name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    ]
    numbers = sum(2 * rows + columns * 2 for rows, columns in attention)  # rank 2: up [out, 2], down [2, in]
    assert told["trained_modules"] == len(attention) == 32
    assert told["trained_parameters"] == numbers
    assert told["base_parameters"] == sum(int(np.prod(shape)) for shape in shapes.values())
    assert told["pictures"] == {"instance": 3, "class": 2}
    assert (told["steps"], told["samples_per_step"]) == (9, 2 * 3 * 2)
    assert told["weights_and_optimizer_bytes"] == told["base_parameters"] * 4 + numbers * 16
    assert told["checkpoint_bytes"] == numbers * 3 * 4  # the values and AdamW's two moments
    # four checkpoints; mean and variance of 5 latents [4, 8, 8]; the product
    assert told["disk_bytes"] == 4 * numbers * 12 + 5 * 2 * (4 * 8 * 8) * 4 + numbers * 4

    whole = ["--plugin", "dreambooth", "--class", "toy", "--data", toys, "--base", tiny_sd1, "--dry-run", "--json"]
    whole = json.loads(persona_("train", *whole).out)
    assert whole["trained_parameters"] == sum(int(np.prod(s)) for (part, _), s in shapes.items() if part == "unet")


def test_a_dry_run_writes_nothing(persona_, toys, tiny_sd1, tmp_path):
    persona_("train", *LORA, "--data", toys, "--base", tiny_sd1, "--dry-run")
    assert list((tmp_path / "here").iterdir()) == []


def test_the_size_on_disk_is_what_the_dry_run_foretold(persona_, made):
    told = json.loads(persona_("train", made / "recipe.yaml", "--dry-run", "--json").out)
    state = made / "checkpoints" / "step-000004" / "state.safetensors"
    assert told["checkpoint_bytes"] < state.stat().st_size < told["checkpoint_bytes"] + 32 * 1024
    assert told["trained_parameters"] * 4 < (made / "adapter.safetensors").stat().st_size


def test_events_as_json_lines(persona_, toys, tiny_sd1, tmp_path):
    run = tmp_path / "run"
    typed = ["--data", toys, "--base", tiny_sd1, "--output", run, "--steps", 2, "--json"]
    answer = persona_("train", *DREAMBOOTH, *typed)
    assert answer.code == 0
    events = [json.loads(line) for line in answer.out.splitlines()]
    kinds = [event["event"] for event in events]
    assert [kind for kind in kinds if kind not in ("Stage", "Note")] == [
        "Sampled", "StepDone", "Sampled", "StepDone", "Sampled", "CheckpointSaved", "Finished"
    ]  # fmt: skip
    steps = [event for event in events if event["event"] == "StepDone"]
    assert [step["step"] for step in steps] == [1, 2]
    assert {"loss", "loss_instance", "loss_class", "learning_rate", "grad_norm", "seconds"} <= set(steps[0]["values"])
    assert events[-1] == {"event": "Finished", "run": str(run), "product": str(run / "adapter.safetensors")}


def test_every_event_of_a_run_reaches_the_plugins_and_one_that_fails_stops_nothing(
    persona_, plugged, toys, tiny_sd1, tmp_path
):
    import persona

    class Listener:
        def __init__(self):
            self.heard = []

        @persona.hookimpl
        def persona_run_started(self, run, settings):
            self.heard.append(("started", run.name, settings["steps"]))

        @persona.hookimpl
        def persona_step_done(self, run, step, values):
            self.heard.append(("step", step, "loss" in values))

        @persona.hookimpl
        def persona_checkpoint_saved(self, run, step, checkpoint):
            self.heard.append(("checkpoint", step, (checkpoint / "state.safetensors").is_file()))

        @persona.hookimpl
        def persona_sampled(self, run, step, pictures):
            self.heard.append(("sampled", step, all(path.is_file() for path in pictures)))

        @persona.hookimpl
        def persona_run_finished(self, run, product):
            self.heard.append(("finished", product.name, product.is_file()))

    class Bad:
        @persona.hookimpl
        def persona_step_done(self, step):
            raise RuntimeError("the tracker is down")

    listener = Listener()
    plugged(listener=listener, bad=Bad())
    typed = ["--data", toys, "--base", tiny_sd1, "--output", tmp_path / "run", "--steps", 2]
    answer = persona_("train", *LORA, *typed)
    assert answer.code == 0
    complaint = "plugin bad failed in persona_step_done and was switched off: RuntimeError: the tracker is down"
    assert answer.err.count(complaint) == 1
    assert listener.heard == [
        ("started", "run", 2),
        ("sampled", 0, True),
        ("step", 1, True),
        ("sampled", 1, True),
        ("step", 2, True),
        ("sampled", 2, True),
        ("checkpoint", 2, True),
        ("finished", "adapter.safetensors", True),
    ]


def test_new_sample_prompts_are_taken_by_a_resumed_run(persona_, copied):
    answer = persona_("train", "--resume", copied, "--steps", 6, "--sample-prompt", "a red dog", "--sample-prompt", "b")
    assert answer.code == 0, answer.err
    assert len(list((copied / "samples" / "step-000006").iterdir())) == 2
    assert Image.open(copied / "samples" / "step-000006" / "00.png").info["prompt"] == "a red dog"


def test_a_run_says_of_itself_what_it_was_made_with(made, tiny_sd1):
    from safetensors import safe_open

    facts = json.loads((made / "environment.json").read_text())
    assert facts["backend"] == "torch"
    assert facts["base"] == str(tiny_sd1)
    assert len(facts["pictures"]) == 3
    assert {"torch", "diffusers", "numpy"} <= set(facts["packages"])
    with safe_open(made / "adapter.safetensors", "numpy") as file:
        about = file.metadata()
    assert about["persona.method"] == "lora"
    assert about["persona.base_hash"] == facts["base_hash"]
    assert about["persona.steps"] == "4"
