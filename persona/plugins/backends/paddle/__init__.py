"""The Paddle backend: ppdiffusers and paddlenlp on cpu and gpu. Importing it imports no framework."""

from persona.plugins.backends.paddle.backend import PaddleBackend

__all__ = ["PaddleBackend"]
