from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from helpers import rows, write_table  # beside this file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_table(tmp_path / "in.csv", rows(30))
