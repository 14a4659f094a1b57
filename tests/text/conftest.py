from __future__ import annotations

from pathlib import Path

import pytest

from moe_prefill.text import Tokenizer
from tests.text.tokenizers_for_tests import REAL, real, write_small


@pytest.fixture(scope="session", params=REAL)
def real_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return real(request.param)


@pytest.fixture(scope="session")
def small_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small"))
