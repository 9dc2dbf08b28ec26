"""The MindSpore backend: mindone's models on cpu and Ascend. Importing it imports no framework."""

from persona.plugins.backends.mindspore.backend import MindSporeBackend

__all__ = ["MindSporeBackend"]
