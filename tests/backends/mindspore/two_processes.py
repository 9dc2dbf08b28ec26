"""What each of two processes does in test_mindspore_processes.py; started by the launcher."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np

from persona.plugins.backends.mindspore import MindSporeBackend


def main() -> None:
    """Sums of figures and of gradients; what came out goes to a file of this process."""
    processes = MindSporeBackend().join("cpu")
    factor = float(processes.rank + 1)
    gradients = {"both": np.full((3, 2), factor, np.float32)}
    if processes.rank == 0:
        time.sleep(float(os.environ["PERSONA_TEST_WAIT"]))  # as while it samples; AllReduce would not wait for so long
    else:
        gradients["one"] = np.full((3, 2), 5.0, np.float32)
    processes.sum_gradients(gradients, {"both": (3, 2), "one": (3, 2), "none": (3, 2)})
    found = {
        "count": processes.count,
        "sum": processes.sum(np.array([[factor, 10.0 * factor, 1e-17]])).tolist(),
        "both": gradients["both"].tolist(),
        "one": gradients["one"].tolist(),
        "none": "none" not in gradients,
    }
    Path(os.environ["PERSONA_TEST_RESULT"], f"{processes.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    processes.barrier()
    processes.leave()
    os._exit(0)


if __name__ == "__main__":
    main()
