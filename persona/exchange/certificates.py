"""The certificate of a conversion: the written files read back, every ΔW compared with the source's by the oracle, and
who is who by hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.adapters.entry import Adapter
from persona.core.adapters.tensor import TensorRef
from persona.core.host.host import Host
from persona.exchange.report import Report
from persona.formats.containers.atomic import atomic_write
from persona.formats.containers.byte_ranges import iterate_bytes


def certificate(
    before: Adapter, report: Report, sources: Sequence[Path], host: Host, base: Any = None
) -> dict[str, Any]:
    """Read back what was written and compare. JSON data: relative error of ΔW per module, alpha's origins, what is
    missing, sha256 of inputs, outputs and their tensors."""
    from persona.core.adapters.certificate import certify

    after = read_back(report.written, before, host)
    return {
        "inputs": [{"path": str(path), "sha256": sha256(path)} for source in sources for path in _files(source)],
        "outputs": [
            {"path": str(path), "sha256": sha256(path), "tensors": tensor_hashes(path, host)} for path in report.written
        ],
        "from": report.source,
        "to": f"{report.dialect} ({report.container})",
        **certify(before, after, base),
        "words": _words(before, after),
        "steps": [_step(step) for step in report.steps],
        "notes": list(report.notes),
        "left_behind": [one.key for one in before.leftovers],
    }


def _step(step: Any) -> dict[str, str]:
    return {"module": step.module, "action": step.action, "cost": step.cost, "detail": step.detail}


def read_back(written: Sequence[Path], before: Adapter, host: Host) -> Adapter:
    """The adapter that other readers will see. The family is told as it is known: a file cannot always say it."""
    from persona.exchange.join import join
    from persona.exchange.load import load_adapter

    paths = [path for path in written if path.suffix.lower() != ".json"]
    adapters = [load_adapter(path, host, family=_told_family(before)) for path in paths]
    return adapters[0] if len(adapters) == 1 else join(adapters)


def _told_family(adapter: Adapter) -> str | None:
    return adapter.family if adapter.entries else None


def _words(before: Adapter, after: Adapter) -> dict[str, float]:
    """For each word the largest difference of its vectors; infinite when it is missing."""
    there = {one.token: one for one in after.embeddings}
    by_place = dict(zip([one.token for one in before.embeddings], after.embeddings, strict=False))
    worst = {}
    for one in before.embeddings:
        other = there.get(one.token) or by_place.get(one.token)
        if other is None or other.vectors.keys() != one.vectors.keys():
            worst[one.token] = float("inf")
            continue
        pairs = [(_wide(one.vectors[name]), _wide(other.vectors[name])) for name in one.vectors]
        same_shape = all(first.shape == second.shape for first, second in pairs)
        worst[one.token] = max(float(np.abs(a - b).max()) for a, b in pairs) if same_shape else float("inf")
    return worst


def _wide(ref: TensorRef) -> np.ndarray[Any, Any]:
    return np.asarray(np.asarray(ref), np.float64)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]


def sha256(path: Path) -> str:
    """Of a file's bytes, 64 hexadecimal digits."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def tensor_hashes(path: Path, host: Host) -> dict[str, str]:
    """sha256 of every tensor's bytes, by name."""
    from persona.exchange.load import open_state

    if path.suffix.lower() == ".json":
        return {}
    found = {}
    for name, ref in open_state(path, host)[1].tensors.items():
        total = hashlib.sha256()
        for piece in iterate_bytes(ref) if ref.python is None else (str(ref.python).encode(),):
            total.update(piece)
        found[name] = total.hexdigest()
    return found


def write_certificate(path: Path, document: Mapping[str, Any], *, force: bool = False) -> None:
    """Write it as JSON. Infinite errors are written as the text "infinite", which JSON can hold."""
    text = json.dumps(_finite(document), indent=1, ensure_ascii=False)
    with atomic_write(path, overwrite=force) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not np.isfinite(value):
        return "infinite" if value > 0 else "not a number"
    return value
