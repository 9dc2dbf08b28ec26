"""Whether a component is a whole one: every parameter of the inventory that its own sizes generate, and no other."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from persona.core.adapters.autoencoder import Autoencoder
from persona.core.adapters.family import Component, inventory
from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import UnreadableFile
from persona.formats.models.ldm_vae import modern

Tensors = Mapping[str, TensorRef]


def refuse_other_than(
    config: Component, parameters: Tensors, what: str, *, passed_over: Collection[str] = (), any_shape: str = ""
) -> None:
    """Raises UnreadableFile unless these are the parameters of `config`, each in its shape. Those `passed_over` may be
    there; the one called `any_shape` has to be there, whatever its shape."""
    wanted: dict[str, tuple[int, ...]] = {}
    for module in inventory(config).values():
        wanted[f"{module.path}.weight"] = module.shape
        if module.bias:
            wanted[f"{module.path}.bias"] = module.shape[:1]
    found = {name: ref.shape for name, ref in parameters.items() if name not in passed_over}
    for verb, listed, hint in (
        ("lacks", wanted.keys() - found.keys(), "Fetch it again, all of it."),
        ("also has", found.keys() - wanted.keys(), "Choose a file of plain fp32, fp16 or bf16 weights."),
    ):
        if listed:
            shown = ", ".join(sorted(listed)[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
            raise UnreadableFile(f"{what} is not one that persona knows: it {verb} {shown}.", hint=hint)
    for name, shape in wanted.items():
        if found[name] != shape and name != any_shape:
            raise UnreadableFile(f"{what}: {name} has shape {list(found[name])}; {list(shape)} belongs there.")


def refuse_other_autoencoder(parameters: Tensors, path: str) -> None:
    """Raises UnreadableFile unless these are a whole AutoencoderKL's, under diffusers' names."""
    renamed = {modern(name): ref for name, ref in parameters.items()}
    refuse_other_than(_autoencoder(renamed, path), renamed, f"The autoencoder in {path}")


def _autoencoder(parameters: Tensors, path: str) -> Autoencoder:
    """The sizes of an autoencoder, from a few of its shapes."""
    widths: list[int] = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in parameters:
        widths.append(_shape(parameters, name, path)[0])
    layers = 0
    while f"encoder.down_blocks.0.resnets.{layers}.conv1.weight" in parameters:
        layers += 1
    return Autoencoder(
        channels=tuple(widths) or _shape(parameters, "encoder.down_blocks.0.resnets.0.conv1.weight", path),
        layers=layers,
        latent=_shape(parameters, "decoder.conv_in.weight", path)[1],
        colours=_shape(parameters, "encoder.conv_in.weight", path)[1],
        quant="quant_conv.weight" in parameters,
    )


def _shape(parameters: Tensors, name: str, path: str) -> tuple[int, ...]:
    if name not in parameters or len(parameters[name].shape) != 4:
        raise UnreadableFile(f"The autoencoder in {path} is not complete: it lacks {name}.")
    return parameters[name].shape
