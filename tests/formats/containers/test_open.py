"""Which container a file is, and what is said of those that are none."""

from __future__ import annotations

import gzip
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from persona.core.adapters.tensor import in_memory
from persona.core.host.contracts import State
from persona.core.host.errors import UnreadableFile
from persona.formats.containers.open import identify, read_state


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"abc", "only 3 bytes"),
        (b"\x01\x02\x03\x04\x05\x06\x07\x08\x09", "01 02 03 04 05 06 07 08"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(30), "7z archive"),
        (gzip.compress(b"\x80\x04}.", mtime=0), "gzip"),
        (b"\xd8\x5e\x3a\x7f" + bytes(30), "encrypted MindSpore"),
        (b'{"a": [1, 2]}', "JSON text"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"GGUF" + bytes(30), "GGUF"),
        (b"\x80\x00" + bytes(30), "protocol"),
        (bytes(64), "zeros"),
    ],
)
def test_foreign_files_are_named_for_what_they_are(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match=said):
        read_state(path)


def test_a_zip_archive_without_weights_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "lora.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UnreadableFile, match=r"neither torch's data\.pkl nor numpy's"):
        read_state(tmp_path / "lora.pt")


def test_folders_and_missing_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="is a folder"):
        identify(tmp_path)
    with pytest.raises(UnreadableFile, match="no file"):
        identify(tmp_path / "nowhere.pt")
    with pytest.raises(UnreadableFile):
        identify(tmp_path / "a\0b")


class Shouting:
    """A container of a plugin: the word WEIGHTS and one number."""

    name = "shouting"
    suffixes = (".shout",)

    def sniff(self, head: bytes, path: Path) -> bool:
        return head.startswith(b"WEIGHTS")

    def read(self, path: Path) -> State:
        return State({"w": in_memory(np.float32(path.read_bytes()[7]))})

    def write(self, path: Path, tensors: object, metadata: object) -> None:
        raise NotImplementedError


def test_the_list_of_containers_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"WEIGHTS\x05")
    assert identify(tmp_path / "x", [Shouting()]).name == "shouting"
    assert float(np.asarray(read_state(tmp_path / "x", [Shouting()]).tensors["w"])) == 5
    with pytest.raises(UnreadableFile):
        read_state(tmp_path / "x")


def test_reading_imports_no_framework_and_no_pictures() -> None:
    fixtures = Path(__file__).parent.parent.parent / "fixtures"
    files = ["torch/ti_sd15/learned_embeds.bin", "paddle/ti-single/learned_embeds.pdparams"]
    files += ["mindspore/dtypes/dtypes.ckpt", "torch/ti_sd15/learned_embeds.safetensors", "torch/ti_sd15/expected.npz"]
    script = (
        "import sys\nfrom persona.formats.containers.open import read_state\n"
        f"for name in {[str(fixtures / name) for name in files]!r}:\n"
        "    [ref.read() for ref in read_state(name).tensors.values()]\n"
        "bad = {'torch', 'paddle', 'mindspore', 'PIL', 'safetensors', 'pickle', 'pickletools'} & set(sys.modules)\n"
        "print(sorted(bad))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['pickle']")  # numpy itself imports pickle
