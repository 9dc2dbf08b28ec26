"""What persona itself gives, through the same hooks as any other plugin. Only names and import paths: nothing here
imports numpy or a framework."""

from __future__ import annotations

from persona.core.host.descriptor import Descriptor
from persona.core.host.hooks import hookimpl


@hookimpl
def persona_methods() -> list[Descriptor]:
    """The built-in training methods."""
    at = "persona.plugins.methods."
    return [
        Descriptor("lora", "Low-rank deltas on attention layers: small file, any base", at + "lora:Lora"),
        Descriptor(
            "dreambooth", "One subject under a rare word, with prior preservation", at + "dreambooth:DreamBooth"
        ),
    ]


@hookimpl
def persona_backends() -> list[Descriptor]:
    """The built-in backends."""
    return [
        Descriptor(
            "torch", "PyTorch on cpu, cuda, mps or npu (diffusers)", "persona.plugins.backends.torch:TorchBackend"
        )
    ]


@hookimpl
def persona_containers() -> list[Descriptor]:
    """The built-in containers, in the order they are tried."""
    at = "persona.formats.containers."
    return [
        Descriptor("safetensors", "safetensors", at + "safetensors:Safetensors", (".safetensors",)),
        Descriptor("torch", "torch pickle, zip or legacy", at + "torch_pickle:TorchPickle", (".pt", ".bin", ".ckpt")),
        Descriptor("paddle", "Paddle .pdparams", at + "paddle:Paddle", (".pdparams",)),
        Descriptor("mindspore", "MindSpore checkpoint", at + "mindspore:MindSpore", (".ckpt",)),
        Descriptor("npz", "numpy .npz or .npy", at + "npz:Npz", (".npz",)),
        Descriptor("picture", "embedding hidden in a PNG or WebP (read)", at + "picture:EmbeddingPicture"),
    ]


@hookimpl
def persona_dialects() -> list[Descriptor]:
    """The built-in spellings of adapters."""
    at = "persona.formats.dialects."
    return [Descriptor("diffusers", "diffusers and PEFT names, alpha in the header", at + "diffusers_peft:DIALECT")]


@hookimpl
def persona_trackers() -> list[Descriptor]:
    """The built-in trackers."""
    return [Descriptor("csv", "metrics.csv in the run folder", "persona.plugins.trackers.csv:CsvTracker")]
