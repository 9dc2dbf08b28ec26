"""Importing diffusers and transformers without their chatter."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKERS = ("diffusers", "transformers", "torch.distributed.elastic.multiprocessing.redirects")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide what the libraries say when they are imported, and their advice and warnings from then on.

    Without torchvision (which persona leaves out on purpose) transformers announces slower picture processors that
    nothing here uses; both log about configs and weights that `loading` checks itself, strictly."""
    # OpenMP threads that spin while they wait make a busy machine crawl: measured here with two other busy processes on
    # two cores, 20 steps on mini ran at 0.3 steps/s spinning and at 3.4 waiting passively. Read once, when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
