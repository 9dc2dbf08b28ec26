"""What each of two processes does in test_paddle_processes.py; started by Paddle's launcher."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np

from persona.plugins.backends.paddle import PaddleBackend


def main() -> None:
    """Sums of figures and of gradients; what came out goes to a file of this process."""
    processes = PaddleBackend().join("cpu")
    import paddle

    from persona.plugins.backends.paddle.layout import Parameter

    both, one, none = (Parameter(paddle.create_parameter([2, 3], "float32"), transposed=True) for _ in range(3))
    factor = float(processes.rank + 1)
    (both.tensor * factor).sum().backward()
    if processes.rank == 0:
        time.sleep(float(os.environ["PERSONA_TEST_WAIT"]))  # as while it samples; gloo would not wait for so long
    else:
        (one.tensor * 5.0).sum().backward()
    processes.sum_gradients([both, one, none])
    found = {
        "count": processes.count,
        "sum": processes.sum(np.array([[factor, 10.0 * factor]])).tolist(),
        "both": both.gradient().tolist(),
        "one": one.gradient().tolist(),
        "none": none.tensor.grad is None,
    }
    Path(os.environ["PERSONA_TEST_RESULT"], f"{processes.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    processes.barrier()
    processes.leave()


if __name__ == "__main__":
    main()
