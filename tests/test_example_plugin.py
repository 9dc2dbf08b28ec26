"""The example plugin as an installed distribution: there after `pip install`, gone after `pip uninstall`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "persona-plugin-cross-attention"


def persona(*arguments: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run persona in a process of its own, with the distributions in `site` installed beside the others."""
    path = [str(EXAMPLE.parents[1]), *([str(site)] if site else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("PERSONA_PLUGINS", None)
    return subprocess.run(
        [sys.executable, "-m", "persona", *arguments], capture_output=True, text=True, env=environment, timeout=60
    )


def install(site: Path) -> None:
    """What pip leaves behind: the package, and metadata with the entry points that its pyproject.toml declares."""
    declaration = (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")
    entry = re.search(r'\[project\.entry-points\.(\w+)\]\n([\w-]+) = "([\w.]+)"', declaration)
    assert entry is not None
    group, name, module = entry.groups()
    information = site / "persona_plugin_cross_attention-0.1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: persona-plugin-cross-attention\nVersion: 0.1.0\n"
    )
    (information / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
    (site / module).symlink_to(EXAMPLE / module)


def plugins(site: Path | None) -> dict[str, dict[str, object]]:
    """What `persona plugins --json` lists, by name."""
    answer = persona("plugins", "--json", site=site)
    return {record["name"]: record for record in json.loads(answer.stdout)}


def test_an_installed_plugin_brings_its_method_and_leaves_no_trace(tmp_path: Path) -> None:
    assert "cross-attention" not in plugins(None), "pip uninstall persona-plugin-cross-attention first"
    install(tmp_path)
    there = plugins(tmp_path)["cross-attention"]
    assert there["state"] == "ok"
    assert there["provides"] == ["method cross-attention"]
    assert (there["package"], there["version"]) == ("persona-plugin-cross-attention", "0.1.0")
    assert "cross-attention" not in plugins(None)


def test_an_installed_plugin_can_be_left_out(tmp_path: Path) -> None:
    install(tmp_path)
    listed = json.loads(persona("-p", "no:cross-attention", "plugins", "--json", site=tmp_path).stdout)
    assert {record["name"]: record["state"] for record in listed}["cross-attention"] == "disabled"
