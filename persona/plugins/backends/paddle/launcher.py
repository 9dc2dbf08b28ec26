"""`python boot.py persona.plugins.backends.paddle.launcher COUNT WORDS…`: `python -m paddle.distributed.launch WORDS…`
with a table that its COUNT processes meet at."""

from __future__ import annotations

import os
import runpy
import sys

from persona.plugins.backends.shared.meeting import MEETING, Table

if __name__ == "__main__":
    os.environ[MEETING] = str(Table(int(sys.argv.pop(1))).port)
    runpy.run_module("paddle.distributed.launch", run_name="__main__", alter_sys=True)
