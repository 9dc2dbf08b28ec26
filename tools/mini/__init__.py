"""The maker of `mini`, the embedded base model: `python -m tools.mini.make --help`."""
