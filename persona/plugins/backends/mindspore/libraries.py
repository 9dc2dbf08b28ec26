"""Importing mindspore, mindone and transformers without their chatter."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

_TALKERS = ("mindone", "transformers")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide what the libraries say when they are imported, and their advice and warnings from then on.

    MindSpore reads GLOG_v once, when it is loaded: 3 is errors alone (it warns of its own deprecated functions with
    every weight). transformers announces that there is no torch, and mindone logs about weights that `loading` checks
    itself, strictly. Whoever has set these variables gets what they say."""
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait make a busy machine crawl
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # mindone prints which attention it has found
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), _own_processors():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _own_processors() -> Iterator[None]:
    """Stay on the processors this process was given: `import mindspore` (2.7.0) takes all of the machine's, whatever
    taskset or a scheduler has said."""
    if not hasattr(os, "sched_setaffinity"):  # Linux alone has it
        yield
        return
    given = os.sched_getaffinity(0)
    yield
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), given)
