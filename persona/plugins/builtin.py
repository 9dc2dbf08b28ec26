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
        Descriptor(
            "textual-inversion",
            "A new word for an object, a style or a face: a file of a few kilobytes",
            at + "textual_inversion:TextualInversion",
        ),
        Descriptor("full", "The weights themselves, whole or by parts: for many captioned pictures", at + "full:Full"),
    ]


@hookimpl
def persona_backends() -> list[Descriptor]:
    """The built-in backends."""
    return [
        Descriptor(
            "torch", "PyTorch on cpu, cuda, mps or npu (diffusers)", "persona.plugins.backends.torch:TorchBackend"
        ),
        Descriptor(
            "paddle", "PaddlePaddle on cpu or gpu (ppdiffusers)", "persona.plugins.backends.paddle:PaddleBackend"
        ),
        Descriptor(
            "mindspore",
            "MindSpore on cpu or Ascend (mindone)",
            "persona.plugins.backends.mindspore:MindSporeBackend",
        ),
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
        Descriptor("picture", "embedding hidden in a PNG or WebP (read)", at + "picture:Picture"),
    ]


@hookimpl
def persona_dialects() -> list[Descriptor]:
    """The built-in spellings of adapters."""
    at = "persona.formats.dialects."
    return [
        Descriptor("diffusers", "diffusers and PEFT names, alpha in the header", at + "diffusers_peft:DIALECT"),
        Descriptor("kohya", "sd-scripts, A1111 and LyCORIS: flat names, alpha per module", at + "kohya:DIALECT"),
        Descriptor("peft", "PEFT folders: weights and adapter_config.json", at + "peft_folder:DIALECT"),
        Descriptor("comfy", "ComfyUI, AI-toolkit, OneTrainer: dotted original names", at + "comfy:DIALECT"),
        Descriptor("diffusers-legacy", "diffusers before PEFT: attention processors", at + "diffusers_legacy:DIALECT"),
        Descriptor("ppdiffusers", "ppdiffusers (Paddle): transposed factors, no alpha", at + "ppdiffusers:DIALECT"),
        Descriptor("mindone", "mindone.diffusers (MindSpore): diffusers names", at + "mindone:DIFFUSERS"),
        Descriptor("mindone-sdv2", "MindONE stable_diffusion_v2: original names", at + "mindone:SDV2"),
        Descriptor("mindone-sdxl", "MindONE stable_diffusion_xl: original names", at + "mindone:SDXL"),
        Descriptor("mindone-kohya", "MindONE's kohya port: dotted names", at + "mindone:KOHYA_PORT"),
        Descriptor("mindpet", "Wukong-Huahua with mindpet (MindSpore)", at + "mindpet:DIALECT"),
        Descriptor("diffsynth", "DiffSynth-Studio: PEFT module dump", at + "diffsynth:DIALECT"),
        Descriptor("diffsynth-2024", "DiffSynth-Studio of 2024 (SDXL, Kolors)", at + "diffsynth:BLOCKS"),
        Descriptor("original", "the original code's names without a prefix", at + "original:DIALECT"),
        Descriptor("xlabs", "XLabs' Flux attention processors (read)", at + "xlabs:DIALECT"),
        Descriptor("cloneofsimo", "cloneofsimo/lora: unnamed pairs (read)", at + "cloneofsimo:DIALECT"),
    ]


@hookimpl
def persona_families() -> list[Descriptor]:
    """The built-in base architectures."""
    at = "persona.formats.models."
    return [
        Descriptor("sd1", "Stable Diffusion 1.x", at + "sd1:FAMILY"),
        Descriptor("sd2", "Stable Diffusion 2.x", at + "sd2:FAMILY"),
        Descriptor("sdxl", "Stable Diffusion XL", at + "sdxl:FAMILY"),
        Descriptor("sdxl-refiner", "Stable Diffusion XL refiner", at + "sdxl_refiner:FAMILY"),
        Descriptor("sd3", "Stable Diffusion 3 and 3.5", at + "sd3:FAMILY"),
        Descriptor("flux1", "Flux.1", at + "flux1:FAMILY"),
        Descriptor("kolors", "Kolors", at + "kolors:FAMILY"),
        Descriptor("wukong", "Wukong-Huahua", at + "wukong:FAMILY"),
    ]


@hookimpl
def persona_optimizers() -> list[Descriptor]:
    """Optimizers beside AdamW, for those who have their packages."""
    at = "persona.plugins.optimizers.packages:"
    return [
        Descriptor("adamw-8bit", "AdamW with moments in 8 bits (bitsandbytes)", at + "ADAMW_8BIT"),
        Descriptor("prodigy", "finds its own step size (prodigyopt)", at + "PRODIGY"),
        Descriptor("lion", "the sign of the momentum (lion-pytorch)", at + "LION"),
        Descriptor("adafactor", "hardly any memory (transformers)", at + "ADAFACTOR"),
    ]


@hookimpl
def persona_trackers() -> list[Descriptor]:
    """The built-in trackers."""
    at = "persona.plugins.trackers."
    return [
        Descriptor("csv", "metrics.csv in the run folder; always on", at + "csv:CsvTracker"),
        Descriptor("tensorboard", "TensorBoard event files in the run's logs", at + "tensorboard:TensorBoard"),
        Descriptor("visualdl", "VisualDL logs in the run's logs (PaddlePaddle's)", at + "visualdl:VisualDL"),
        Descriptor("wandb", "Weights & Biases", at + "wandb:WeightsAndBiases"),
    ]


@hookimpl
def persona_scorers() -> list[Descriptor]:
    """The built-in judges of pictures."""
    return [Descriptor("clip", "CLIP: the same subject? what the prompt says?", "persona.plugins.scorers.clip:Clip")]


@hookimpl
def persona_commands() -> list[Descriptor]:
    """The built-in verbs, in the order of `persona --help`."""
    at = "persona.commands."
    return [
        Descriptor("train", "Make a model personal: a subject, a style, a word.", at + "train:train"),
        Descriptor("generate", "Make pictures from a base and adapters.", at + "generate:generate"),
        Descriptor("export", "Write any checkpoint of a run as an adapter.", at + "export:export"),
        Descriptor("convert", "Move adapters and embeddings between formats.", at + "convert:convert"),
        Descriptor("inspect", "Tell what a file is, without running it.", at + "inspect:inspect"),
        Descriptor("diff", "Tell whether two adapters mean the same.", at + "diff:diff"),
        Descriptor("merge", "Add adapters up, or into a base model.", at + "merge:merge"),
        Descriptor("extract", "Make a LoRA of the difference of two models.", at + "extract:extract"),
        Descriptor("resize", "Write an adapter at another rank.", at + "resize:resize"),
        Descriptor("data", "Look at pictures the way a trainer will.", at + "data:data"),
        Descriptor("score", "Judge pictures: the same subject? what the prompt says?", at + "score:score"),
        Descriptor("plugins", "List what is plugged in, and what is broken.", at + "plugins:plugins"),
        Descriptor("backends", "Show what computes here; set frameworks up.", at + "backends:backends"),
        Descriptor("doctor", "Find what is broken here, and what puts it right.", at + "doctor:doctor"),
    ]
