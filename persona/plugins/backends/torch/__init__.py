"""The torch backend: diffusers and transformers on cpu, cuda, mps and npu. Importing it imports no framework."""

from persona.plugins.backends.torch.backend import TorchBackend

__all__ = ["TorchBackend"]
