"""`python launched.py MODULE`: Paddle's launcher starts files only, so this one runs the module it is told."""

import runpy
import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose files are no top-level modules
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
