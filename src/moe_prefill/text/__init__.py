"""Text to token ids and back, and a model's chat template. Torch-free."""

from .chat import ChatTemplate
from .tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Tokenizer"]
