"""persona.train, persona.resume and persona.generate, as other programs call them."""

import numpy as np
import pytest

import persona


def test_train_resume_and_generate_do_what_the_command_line_does(toys, tiny_sd1, tmp_path, persona_):
    heard = []
    options = {"prompt": "a toy", "batch": 1, "rank": 2, "sample_steps": 1, "title": "toy"}
    run = persona.train("lora", toys, base=tiny_sd1, steps=2, output=tmp_path / "run", emit=heard.append, **options)
    assert run.path == tmp_path / "run"
    assert run.product == tmp_path / "run" / "adapter.safetensors"
    assert [event.step for event in heard if type(event).__name__ == "StepDone"] == [1, 2]

    typed = ["--plugin", "lora", "--prompt", "a toy", "--batch", 1, "--rank", 2, "--sample-steps", 1, "--title", "toy"]
    typed += ["--data", toys, "--base", tiny_sd1, "--steps", 3, "--output", tmp_path / "typed"]
    assert persona_("train", *typed).code == 0
    again = persona.resume(run, steps=3)
    assert again.product.read_bytes() == (tmp_path / "typed" / "adapter.safetensors").read_bytes()

    adapter = persona.load(again.product)
    assert len(adapter.deltas()) == 32
    plain, same = persona.generate(["a toy", "a toy"], base=tiny_sd1, steps=2)
    assert np.array_equal(plain, same)
    for given in (again.product, f"{again.product}:0.5", (again.product, 0.5)):
        (picture,) = persona.generate("a toy", base=str(tiny_sd1), adapters=[given], steps=2)
        assert picture.size == (64, 64)
    assert len(persona.generate("a toy", base=tiny_sd1, steps=1, count=2, seed=4)) == 2


def test_mistakes_are_persona_errors_with_the_line_to_type(toys, tiny_sd1, tmp_path):
    with pytest.raises(persona.PersonaError, match="stepps: unknown key stepps") as caught:
        persona.train("lora", toys, base=tiny_sd1, prompt="x", stepps=3)
    assert caught.value.hint == "Did you mean steps?"
    with pytest.raises(persona.PersonaError, match="There is no method called lorra"):
        persona.train("lorra", toys)
    with pytest.raises(persona.PersonaError, match="There is no run") as caught:
        persona.resume(tmp_path / "none")
    assert "--resume" in caught.value.hint
    with pytest.raises(persona.PersonaError, match=r"There is no option step\. Did you mean steps"):
        persona.generate("a toy", step=3)


def test_a_persona_yaml_of_the_current_folder_is_none_of_a_programs_business(toys, tiny_sd1, tmp_path, monkeypatch):
    (tmp_path / "persona.yaml").write_text("method: lora\nsteps: 3\nqqq: 1\n")
    monkeypatch.chdir(tmp_path)
    run = persona.train("lora", toys, base=tiny_sd1, prompt="a toy", steps=1, batch=1, sample_steps=1)
    assert run.plan().steps == 1
    assert run.path.resolve() == tmp_path / "runs" / "lora-001"
