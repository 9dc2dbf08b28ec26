"""The maker of the judge, a small CLIP that scores pictures of mini's world: `python -m tools.judge.make --help`."""
