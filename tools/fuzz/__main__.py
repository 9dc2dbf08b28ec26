"""Coverage-guided fuzzing of every container and dialect with atheris (`pip install atheris`).

    python -m tools.fuzz bytes --minutes 10         files, begun from those other programs wrote (tests/fixtures)
    python -m tools.fuzz names --minutes 10         names and shapes in every dialect's spelling

It stops at the first input that brings out anything but persona's own error, and keeps it in the corpus folder's
`crash-…`. The tests do the same for seconds with hypothesis (tests/exchange/test_fuzz.py, test_hostile_files.py)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures"
ENDINGS = {".safetensors", ".pdparams", ".ckpt", ".bin", ".pt"}
LARGEST_SEED = 40_000


def seeds(folder: Path) -> None:
    """Copies of the small fixtures, where the corpus is empty."""
    for path in FIXTURES.rglob("*"):
        if path.suffix in ENDINGS and path.is_file() and path.stat().st_size <= LARGEST_SEED:
            (folder / "_".join(path.relative_to(FIXTURES).parts)).write_bytes(path.read_bytes())


def main() -> int:
    """Fuzz until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("bytes", "names"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--corpus", type=Path, default=None, help="where inputs are kept (default: build/fuzz/TARGET)")
    arguments = parser.parse_args()
    try:
        import atheris
    except ImportError:
        print("atheris is not installed here: pip install atheris", file=sys.stderr)
        return 2
    corpus = arguments.corpus or Path("build/fuzz") / arguments.target
    corpus.mkdir(parents=True, exist_ok=True)
    if arguments.target == "bytes" and not any(corpus.iterdir()):
        seeds(corpus)
    with atheris.instrument_imports(include=["persona"]):
        from tools.fuzz.targets import TARGETS
    options = [
        f"-max_total_time={int(arguments.minutes * 60)}",
        f"-max_len={LARGEST_SEED if arguments.target == 'bytes' else 200}",
        "-timeout=600",
        "-rss_limit_mb=2048",
        f"-artifact_prefix={corpus.parent}/{arguments.target}-",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[arguments.target])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
