"""Text to token ids and back, and a model's chat template. Torch-free."""

from moe_prefill.text.chat import ChatTemplate
from moe_prefill.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Tokenizer"]
