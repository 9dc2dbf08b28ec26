"""The suffixes that tell an adapter's tensors apart, and the grouping of a file's keys by them (dialects.md §1.3).

One table for every dialect: what follows the module's name says which factor a tensor is. The longest suffix wins, and
what is left must be the same string for every factor of one module.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

SUFFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "kohya": (
        (r"\.lora_down\.weight", "down"),
        (r"\.lora_up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.lora_up\.bias", "bias"),
    ),
    "peft": (
        (r"\.lora_A\.weight", "down"),
        (r"\.lora_B\.weight", "up"),
        (r"\.lora_A", "down"),
        (r"\.lora_B", "up"),
        (r"\.lora_B\.bias", "bias"),
        (r"\.lora_embedding_A", "embedding_a"),
        (r"\.lora_embedding_B", "embedding_b"),
    ),
    "peft module": (
        (r"\.lora_A\.[A-Za-z0-9_-]+\.weight", "down"),
        (r"\.lora_B\.[A-Za-z0-9_-]+\.weight", "up"),
        (r"\.lora_B\.[A-Za-z0-9_-]+\.bias", "bias"),
        (r"\.lora_magnitude_vector\.[A-Za-z0-9_-]+(?:\.weight)?", "magnitude_out"),
    ),
    "dotted": ((r"\.lora\.down\.weight", "down"), (r"\.lora\.up\.weight", "up")),
    "linear layer": ((r"\.lora_linear_layer\.down\.weight", "down"), (r"\.lora_linear_layer\.up\.weight", "up")),
    "numbered processor": (
        (r"(?<=_lora[12])\.down\.weight", "down"),
        (r"(?<=_lora[12])\.up\.weight", "up"),
    ),
    "processor": ((r"_lora\.down\.weight", "down"), (r"_lora\.up\.weight", "up")),
    "mindpet": (
        (r"\.(?:mindpet|tk)_delta_lora_[aA]", "down"),
        (r"\.(?:mindpet|tk)_delta_lora_[bB]", "up"),
    ),
    "loha": tuple((rf"\.hada_{name}", name) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    "lokr": tuple((rf"\.lokr_{name}", name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    "full": ((r"\.diff", "diff"), (r"\.diff_b", "diff_b")),
    "norm": ((r"\.w_norm", "w_norm"), (r"\.b_norm", "diff_b")),
    "ia3": ((r"\.on_input", "on_input"), (r"\.ia3_l", "ia3_l")),
    "glora": tuple((rf"\.{name}\.weight", name) for name in ("a1", "a2", "b1", "b2", "bm")),
    "oft": (
        (r"\.oft_blocks", "oft_blocks"),
        (r"\.oft_diag", "oft_diag"),
        (r"\.oft_R(?:\.weight)?", "oft_R"),
        (r"\.oft_R\.scaled_oft", "scaled_oft"),
        (r"\.boft_R", "boft_R"),
        (r"\.boft_s", "boft_s"),
        (r"\.rescale", "rescale"),
    ),
    "patch": ((r"\.set_weight", "set_weight"), (r"\.reshape_weight", "reshape_weight")),
    "any": (
        (r"\.alpha", "alpha"),
        (r"\.scalar", "scalar"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.lora_magnitude_vector(?:\.weight)?", "magnitude_out"),
        (r"\.magnitude", "magnitude_out"),
    ),
}
"""Spelling -> (suffix as a regular expression, factor). "any" goes with every spelling."""

BOOKKEEPING = re.compile(
    r"(?:^|\.)(?:_aux\.|initial_norm|optimizer|network_args$|step$|global_step$|epoch$|epoch_num$|step_num$|"
    r"learning_rate$|adam_[mv]\.|moment[12]\.|moments\.|beta[12]_power$|position_ids$|bypass$|"
    r"StructuredToParameterName@@|UnpackBigParamInfor@@|lr_schedulers|loops|callbacks|optimizer_states|"
    r"pytorch-lightning_version$|hyper_parameters|hparams_name)"
)
"""Keys that are not weights (dialects.md §5.13, stacks/mindspore.md §3): dropped, and reported by name."""

OPTIMIZER = ("adam_m.", "adam_v.", "moment1.", "moment2.", "moments.", "optimizer", "_aux.")
"""Beginnings of an optimizer's keys, which end as the factors' keys do."""

WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.)+")

_ALTERNATIVES = [(suffix, factor, spelling) for spelling, table in SUFFIXES.items() for suffix, factor in table]
_LITERAL = {
    suffix.replace(r"\.", "."): (factor, spelling)
    for suffix, factor, spelling in _ALTERNATIVES
    if re.fullmatch(r"(?:\\\.\w+)+", suffix)
}
_LONGEST = max(suffix.count(".") for suffix in _LITERAL)
_INSIDE_A_WORD = {
    suffix.replace(r"\.", "."): (factor, spelling)
    for suffix, factor, spelling in _ALTERNATIVES
    if re.fullmatch(r"\w+(?:\\\.\w+)*", suffix)
}


@dataclass
class Group:
    """The keys of one module: factor -> key, and the spellings they are written in."""

    module: str
    keys: dict[str, str] = field(default_factory=dict)
    spellings: set[str] = field(default_factory=set)


@dataclass
class Grouped:
    """A file's keys sorted out: modules, bookkeeping, and what no suffix explains."""

    groups: dict[str, Group]
    bookkeeping: list[str]
    unexplained: list[str]
    duplicates: list[tuple[str, str]]


_last = threading.local()


def group(keys: Iterable[str]) -> Grouped:
    """Sort the keys of a file by module and factor. Embeddings bundled in the file (`bundle_emb.`) are passed over.

    Every dialect asks this of the same file in turn, so the last answer is kept.
    """
    if getattr(_last, "keys", None) is not keys:
        _last.keys, _last.grouped = keys, _group(keys)
    grouped: Grouped = _last.grouped
    return grouped


@lru_cache(maxsize=1)
def _any_suffix() -> re.Pattern[str]:
    """Every suffix in one expression; made when a key needs it, since that takes as long as reading a small file."""
    return re.compile("^(.+?)(?:" + "|".join(f"({suffix})" for suffix, _, _ in _ALTERNATIVES) + ")$")


def split_key(key: str) -> tuple[str, str, str] | None:
    """(module, factor, spelling) of a key, or None. Whole words behind dots are looked up, the longest first; only a
    key that no such suffix ends is searched, which costs fifty times as much."""
    place = len(key)
    found = None
    for _ in range(_LONGEST):
        place = key.rfind(".", 0, place)
        if place <= 0:
            break
        if key[place:] in _LITERAL:
            found = (key[:place], *_LITERAL[key[place:]])
    if found is not None:
        return found
    for suffix, (factor, spelling) in _INSIDE_A_WORD.items():
        if key.endswith(suffix) and len(key) > len(suffix):
            return key[: -len(suffix)], factor, spelling
    match = _any_suffix().match(key)
    if match is None:
        return None
    _, factor, spelling = _ALTERNATIVES[match.lastindex - 2]  # type: ignore[operator]
    return match[1], factor, spelling


def _group(keys: Iterable[str]) -> Grouped:
    listed = [key for key in keys if not key.startswith("bundle_emb.")]
    result = Grouped({}, [], [], [])
    input_scaled = {key[: -len("on_input")] + "weight" for key in listed if key.endswith(".on_input")}
    for key in listed:
        bare = WRAPPERS.sub("", key)
        if bare in input_scaled:
            _put(result, bare[: -len(".weight")], "weight", "ia3", key)
            continue
        if bare.startswith(OPTIMIZER):
            result.bookkeeping.append(key)
            continue
        parts = split_key(bare)
        if parts:
            _put(result, *parts, key)
        elif BOOKKEEPING.search(bare):
            result.bookkeeping.append(key)
        else:
            result.unexplained.append(key)
    return result


def _put(result: Grouped, module: str, factor: str, spelling: str, key: str) -> None:
    group = result.groups.setdefault(module, Group(module))
    if factor in group.keys:
        result.duplicates.append((group.keys[factor], key))
        return
    group.keys[factor] = key
    group.spellings.add(spelling)
