"""What MindSpore remembers of a gradient that was not finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mindspore.common.api import _pynative_executor


@contextmanager
def forgotten_on_error() -> Iterator[None]:
    """Context of a forward and backward. When it ends in an error, what MindSpore has noted down of it is forgotten:
    else the next gradient of this process, another session's too, fails for that (MindSpore 2.7.0: "For LayerNormGrad,
    the index 7 is out of range of input num 7")."""
    try:
        yield
    except BaseException:
        _pynative_executor.set_grad_flag(False)
        _pynative_executor.clear_res()
        raise
