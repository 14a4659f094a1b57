"""Workers that only pretend to compute, for the tests that ask for them."""

import os
import tempfile
from pathlib import Path

import pytest

from moe_prefill.workers import group
from tests.workers.helpers import workers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake_workers(monkeypatch, tmp_path):
    """Workers run the fake; whatever happens in a test, it leaves no process, no file and no open socket."""
    monkeypatch.setattr(group, "WORKER", "tests.workers.fake_worker")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    yield
    assert workers() == []
    assert list(tmp_path.glob("moe-prefill-*")) == []
    assert len(os.listdir("/proc/self/fd")) <= len(before)
