"""The first thing that runs in a process that persona starts: finds the persona that started it, and nothing else.

It is run as `PYTHON -I boot.py MODULE …`, or by a framework's launcher as the file it starts. Isolated mode and an
import by place keep the starting environment's packages (its torch, above all) out; what is imported is persona's own
source, so both ends are always of one version, and nothing of persona has to be installed there."""

import importlib.util
import runpy
import sys
from pathlib import Path


def find_persona() -> None:
    """Make `import persona` mean the package this file lies in."""
    package = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        "persona", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["persona"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent  # on the path without isolated mode, and its files are no modules
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    find_persona()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
