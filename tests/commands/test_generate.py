"""`persona generate`: settings inside the PNG, strengths, sheets, and nothing overwritten."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

QUICK = ["--steps", 2, "--guidance-scale", 2]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_sd1):
    """Two LoRAs of the tiny base that were trained (at a rate that shows)."""
    from persona.cli import run

    folder = tmp_path_factory.mktemp("adapters")
    (folder / "data").mkdir()
    drawn = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(drawn).save(folder / "data" / "toy.png")
    made = []
    for seed in (1, 2):
        words = ["train", "--plugin", "lora", "--prompt", "a toy", "--data", folder / "data", "--base", tiny_sd1]
        words += ["--steps", 3, "--batch", 1, "--rank", 2, "--learning-rate", 0.3, "--sample-steps", 1]
        assert run([str(word) for word in [*words, "--seed", seed, "--output", folder / f"run-{seed}"]]) == 0
        made.append(folder / f"run-{seed}" / "adapter.safetensors")
    return made


@pytest.fixture
def generate(persona_, tiny_sd1, tmp_path, monkeypatch):
    """`generate(…)`: the pictures that were written, in order, as arrays."""
    monkeypatch.chdir(tmp_path)

    def make(*words, base=tiny_sd1):
        answer = persona_("generate", "--base", base, *QUICK, *words)
        assert answer.code == 0, answer.err
        return [np.array(Image.open(path)) for path in answer.out.split()]

    return make


def test_prompts_times_count_with_seeds_that_count_up(generate, persona_, tmp_path):
    three = generate("--prompt", "a cat", "--seed", 5, "--count", 3)
    assert len(three) == 3
    assert not np.array_equal(three[0], three[1])
    # alone and in a batch, last bits differ
    np.testing.assert_allclose(generate("--prompt", "a cat", "--seed", 6)[0].astype(int), three[1], atol=1)
    four = generate("--prompt", "a cat", "--prompt", "a dog", "--seed", 5, "--count", 2, "--batch", 1)
    assert len(four) == 4
    np.testing.assert_allclose(four[1].astype(int), three[1], atol=1)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"{n:04d}.png" for n in range(8)]


def test_the_settings_are_inside_the_picture_in_both_spellings(generate, adapters, tmp_path, tiny_sd1):
    generate("--prompt", "a cat, größer", "--negative-prompt", "blur", "--seed", 9, "--adapter", f"{adapters[0]}:0.5")
    found = Image.open(tmp_path / "pictures" / "0000.png").info
    told = json.loads(found["persona"])
    assert told["prompt"] == "a cat, größer"
    assert told["adapters"] == [{"file": "adapter.safetensors", "strength": 0.5}]
    assert (told["seed"], told["steps"], told["guidance_scale"], told["sampler"]) == (9, 2, 2.0, "ddim")
    assert (told["size"], told["base"]) == ([64, 64], str(tiny_sd1))
    lines = found["parameters"].splitlines()
    assert lines[0] == "a cat, größer"
    assert lines[1] == "Negative prompt: blur"
    assert lines[2].startswith("Steps: 2, Sampler: ddim, CFG scale: 2, Seed: 9, Size: 64x64, Model: ")


def test_at_strength_0_an_adapter_changes_no_bit_and_at_others_it_changes_as_told(generate, adapters):
    plain = generate("--prompt", "a toy")[0]
    np.testing.assert_array_equal(generate("--prompt", "a toy", "--adapter", f"{adapters[0]}:0")[0], plain)
    full = generate("--prompt", "a toy", "--adapter", adapters[0])[0]
    assert not np.array_equal(full, plain)
    np.testing.assert_array_equal(generate("--prompt", "a toy", "--adapter", f"{adapters[0]}:1.0")[0], full)
    assert not np.array_equal(generate("--prompt", "a toy", "--adapter", f"{adapters[0]}:-1")[0], full)


def test_two_adapters_are_the_base_with_both_deltas_added_by_hand(generate, adapters, tiny_sd1, tmp_path):
    from safetensors.numpy import load_file, save_file

    base = shutil.copytree(tiny_sd1, tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for path, strength in zip(adapters, (0.5, 2.0), strict=True):
        stored = load_file(path)
        downs = {name: array for name, array in stored.items() if name.endswith(".lora_A.weight")}
        assert len(downs) == 32
        for name, down in downs.items():
            up = stored[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("unet.").replace(".lora_A", "")
            weights[target] += np.float32(strength) * (up @ down)  # alpha is the rank: scale 1
    save_file(weights, file)
    words = ["--prompt", "a toy", "--seed", 3]
    both = generate(*words, "--adapter", f"{adapters[0]}:0.5", "--adapter", f"{adapters[1]}:2")[0]
    by_hand = generate(*words, base=base)[0]
    assert not np.array_equal(both, generate(*words)[0])
    np.testing.assert_allclose(both.astype(int), by_hand, atol=2)


def test_the_sheet_has_a_row_a_prompt_and_a_column_a_seed_and_is_not_overwritten(
    generate, persona_, tiny_sd1, tmp_path
):
    words = ["--prompt", "a cat", "--prompt", "a dog", "--count", 3]
    made = generate(*words, "--grid", tmp_path / "sheet.png")
    assert len(made) == 7
    sheet = made[-1]
    cells = [picture.repeat(3, 0).repeat(3, 1) for picture in made[:6]]  # 64 pixels shown as 192
    places = set()
    for cell in cells:
        rows, columns = np.nonzero((sheet == cell[0, 0]).all(-1))
        where = {
            (row, column)
            for row, column in zip(rows, columns, strict=True)
            if np.array_equal(sheet[row : row + 192, column : column + 192], cell)
        }
        assert where
        places |= where
    assert len({row for row, _ in places}) == 2
    assert len({column for _, column in places}) == 3
    before = (tmp_path / "sheet.png").read_bytes()
    answer = persona_("generate", "--base", tiny_sd1, *QUICK, *words, "--grid", tmp_path / "sheet.png")
    assert answer.code == 1
    assert "sheet.png is there already." in answer.err
    assert (tmp_path / "sheet.png").read_bytes() == before


def test_pictures_that_are_there_are_not_overwritten(generate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0000.png").write_text("mine")
    (tmp_path / "out" / "0007.png").write_text("mine")
    (tmp_path / "out" / "notes.png").write_text("mine")
    generate("--prompt", "a cat", "--count", 2, "--output", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0000.png", "0007.png", "0008.png", "0009.png", "notes.png"
    ]  # fmt: skip
    assert (tmp_path / "out" / "0000.png").read_text() == "mine"


def test_a_run_of_whole_weights_is_a_base(persona_, toys, tiny_sd1, tmp_path, generate):
    run = tmp_path / "run"
    words = ["--plugin", "dreambooth", "--class", "toy", "--class-pictures", 0, "--data", toys, "--base", tiny_sd1]
    words += ["--steps", 2, "--batch", 1, "--sample-steps", 1, "--learning-rate", 1e-2, "--output", run]
    assert persona_("train", *words).code == 0
    assert sorted(path.name for path in (run / "model").iterdir()) == ["persona.json", "unet"]
    trained = generate("--prompt", "a toy", base=run)[0]
    assert not np.array_equal(trained, generate("--prompt", "a toy")[0])
    about = json.loads((run / "model" / "persona.json").read_text())
    assert about["base"] == str(tiny_sd1)


def test_as_json_the_paths_are_a_list(persona_, tiny_sd1, tmp_path):
    out = tmp_path / "out"
    answer = persona_("generate", "--base", tiny_sd1, *QUICK, "--prompt", "a cat", "--output", out, "--json")
    assert json.loads(answer.out) == [str(out / "0000.png")]


@pytest.mark.parametrize(
    ("words", "code", "said", "hint"),
    [
        ([], 2, "There is no prompt.", '--prompt "a red apple"'),
        (["--prompt", "x", "--sampler", "dim"], 2, 'There is no sampler "dim"', "Did you mean ddim"),
        (["--prompt", "x", "--width", 100], 2, "multiples of 8, not 100x64", "--width 96 --height 64"),
        (["--prompt", "x", "--device", "cuda:99"], 1, "cuda:99 was asked for", "--device"),
        (["--prompt", "x", "--precision", "fp8"], 2, "'fp8' is not one of", "persona generate --help"),
        (["--prompt", "x", "--steps", 0], 2, "0 is not in the range", "persona generate --help"),
        (["--prompt", "x", "--adapter", "none.safetensors"], 1, "There is no file none.safetensors", ""),
        (["--prompt", "x", "--grid", "sheet.jpg"], 2, "sheet.jpg has to be a PNG", "--grid sheet.png"),
        (["--prompt", "x", "--output", __file__], 1, "cannot be written: File exists", "--output FOLDER"),
        (["--promt", "x"], 2, "No such option '--promt'", "persona generate --help"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_made_is_answered_in_one_line(
    persona_, tiny_sd1, tmp_path, monkeypatch, words, code, said, hint
):
    monkeypatch.chdir(tmp_path)
    answer = persona_("generate", "--base", tiny_sd1, *words)
    assert answer.code == code
    lines = answer.err.splitlines()
    assert len(lines) == 2, answer.err
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert hint in lines[1]
    assert not list(tmp_path.rglob("*.png"))


def test_a_strength_that_is_no_number_is_named(persona_, tiny_sd1, adapters):
    answer = persona_("generate", "--base", tiny_sd1, "--prompt", "x", "--adapter", f"{adapters[0]}:strong")
    assert answer.code == 2
    assert "The strength 'strong' is not a number." in answer.err
    assert f"--adapter {adapters[0]}:0.8" in answer.err


def test_an_adapter_of_another_base_is_refused_before_a_picture_is_made(persona_, adapters, tmp_path, monkeypatch):
    from tests.narrow_models import narrow_pipeline

    monkeypatch.chdir(tmp_path)
    other = narrow_pipeline("sd1", tmp_path / "other")
    answer = persona_("generate", "--base", other, "--prompt", "x", "--adapter", adapters[0])
    assert answer.code == 1
    assert "The adapter was made for another base model." in answer.err
    assert not list(tmp_path.rglob("*.png"))
