"""docs/formats.md says what the tables say."""

import os

from tools.docs.formats_reference import PAGE, page


def test_the_page_is_as_it_would_be_written(monkeypatch):
    monkeypatch.setenv("PERSONA_PLUGINS", os.environ.get("PERSONA_PLUGINS", ""))  # page() sets it
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/formats.md is old: make docs"


def test_every_dialect_that_is_written_shows_a_key():
    from persona.api import host

    text = page()
    for name in host().provided("dialect"):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| **{name}** | ") and "nowhere" in line] or [
            line for line in text.splitlines() if line.startswith(f"| **{name}** | ")
        ][:1]
        assert row.split("|")[3].strip(), f"{name} has no example"
