"""The model card of a run: README.md beside the product, as model hubs read it, with the commands that use it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from persona.core.training.base import Base
from persona.core.training.plan import NewTokens, TrainingPlan, Weights
from persona.hub.registry import registry
from persona.runs.about import data_hash


def model_card(
    plan: TrainingPlan, base: Base, *, title: str, product: Path, prompts: Sequence[str], also: Sequence[Path] = ()
) -> str:
    """The card as Markdown with a YAML head. Paths in it are relative to the card's own folder."""
    import yaml

    source = registry()["bases"].get(base.id, {}).get("source", base.id)
    trigger = plan.metadata.get("trigger", "")
    prompt = next(iter(prompts), trigger or "a photo")
    head = {
        "library_name": "diffusers",
        "base_model": source if source != "package" else base.id,
        "tags": list(
            dict.fromkeys(("text-to-image", "persona", plan.method, *(("lora",) if is_low_rank(plan) else ())))
        ),
        **({"instance_prompt": trigger} if trigger else {}),
    }
    own = [picture for stream in plan.streams if stream.generated is None for picture in stream.pictures]
    made = sum(len(stream.pictures) for stream in plan.streams if stream.generated is not None)
    rows = [
        ("method", plan.method),
        ("base", f"{base.id} ({base.family}), digest `{base.hash[:16]}`"),
        ("word to use", f"`{trigger}`" if trigger else "none: it is in the captions"),
        ("pictures", f"{len(own)} of one's own" + (f", {made} class pictures" if made else "")),
        ("data digest", f"`{data_hash(plan)[:16]}`"),
        ("trained", "; ".join(_part_words(part) for part in plan.trains)),
        ("steps", f"{plan.steps} of {plan.batch * plan.accumulation} samples a stream"),
        ("size", f"{plan.width} x {plan.height}" + (" in aspect buckets" if plan.buckets else "")),
        ("seed", str(plan.seed)),
    ]
    lines = [
        "---", yaml.safe_dump(head, allow_unicode=True, sort_keys=False).strip(), "---", "", f"# {title}", "",
        "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "",
        *(["![samples](sheet.png)", ""] if (product.parent / "sheet.png").is_file() else []),
        "## Use it", "", "```sh", generate_line(plan, base, product.name, prompt), "```", "",
        *diffusers_lines(plan, base, product.name, prompt),
        *_converting(plan, product.name, also),
        "## Make it again", "", "```sh", "persona train recipe.yaml", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def is_low_rank(plan: TrainingPlan) -> bool:
    """Whether the product is low-rank deltas."""
    return any(part.kind == "low-rank" for part in plan.trains)


def _part_words(part: object) -> str:
    if isinstance(part, Weights):
        return f"{part.component}, whole weights"
    if isinstance(part, NewTokens):
        return ", ".join(f"`{token.placeholder}` ({token.vectors} vectors)" for token in part.tokens)
    rank, alpha = getattr(part, "rank", ""), getattr(part, "alpha", "")
    return f"{getattr(part, 'component', '')}, rank {rank}, alpha {alpha:g}"


def generate_line(plan: TrainingPlan, base: Base, product: str, prompt: str) -> str:
    """The command that uses the product, typed in the run's folder."""
    whole = any(isinstance(part, Weights) for part in plan.trains)
    words = Path(product).with_name(f"{Path(product).stem}_emb{Path(product).suffix}").name
    beside = f" --adapter {words}" if is_low_rank(plan) and any(isinstance(p, NewTokens) for p in plan.trains) else ""
    how = "--base ." if whole else f"--base {shlex.quote(base.id)} --adapter {product}{beside}"
    return f"persona generate {how} --prompt {shlex.quote(prompt)}"


def diffusers_lines(plan: TrainingPlan, base: Base, product: str, prompt: str) -> list[str]:
    """The same with diffusers alone, where that opens the product directly."""
    two_files = len(base.text_encoders) > 1 and not is_low_rank(plan)  # diffusers wants one call an encoder
    if two_files or any(isinstance(part, Weights) for part in plan.trains):
        return []
    packaged = registry()["bases"].get(base.id, {}).get("source") == "package"
    source = f"locate({base.id!r})" if packaged else repr(registry()["bases"].get(base.id, {}).get("source", base.id))
    load = "load_lora_weights" if is_low_rank(plan) else "load_textual_inversion"
    return [
        "```python",
        "from diffusers import DiffusionPipeline",
        *(["from persona.hub.bases import locate"] if packaged else []),
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({source})",
        f"pipeline.{load}({product!r})",
        f"picture = pipeline({prompt!r}).images[0]",
        "```",
        "",
    ]


def _converting(plan: TrainingPlan, product: str, also: Sequence[Path]) -> list[str]:
    if any(isinstance(part, Weights) for part in plan.trains):
        return []
    lines = [f"Also here: {', '.join(f'`{path.name}`' for path in also)}.", ""] if also else []
    name = "kohya.safetensors"
    return [
        *lines,
        "For ComfyUI, A1111 and others:",
        "",
        "```sh",
        f"persona convert {product} {name} --to kohya",
        "```",
        "",
    ]
