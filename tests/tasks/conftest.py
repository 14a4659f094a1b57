from __future__ import annotations

import pytest

from moe_prefill.text import Tokenizer
from tests.text.tokenizers_for_tests import write_small


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of about 420 tokens with <s> (added), </s> and a chat template."""
    template = (
        "{{ bos_token }}{% for m in messages %}<|end|>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "<|end|>{{ 'assistant\n' }}"  # jinja drops a last line break that is not in an expression
    )
    return Tokenizer.from_directory(write_small(tmp_path_factory.mktemp("tasks"), chat_template=template))
