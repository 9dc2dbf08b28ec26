"""Importing paddle, ppdiffusers and paddlenlp without their chatter."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

_TALKERS = ("PaddleNLP", "ppdiffusers", "paddle", "paddle.distributed", "jieba", "huggingface_hub")


@contextmanager
def quiet_paddle() -> Iterator[None]:
    """Hide what Paddle says when it is imported (that compilers for extensions are missing), and its logs."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make a busy machine crawl
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle's C++ half: errors only
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide what all the libraries say when they are imported, and their advice from then on: deprecated functions of
    packages that nothing here uses, and configs and weights that `loading` checks itself, strictly."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with quiet_paddle():
        yield
    np.bool = np.bool_  # type: ignore[misc]  # ppdiffusers makes it Python's bool, which numpy itself cannot live with
    from ppdiffusers.utils import logging as ppdiffusers_logging

    ppdiffusers_logging.set_verbosity_error()
