"""Names for models by what their files hold, cheap enough to compute at every start."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of each weight file: tells two trainings of one architecture apart


def model_fingerprint(directory: Path) -> str:
    """Digest of a checkpoint: its config and index in full, and of each weight file its name, size and 16 samples."""
    digest = hashlib.sha256()
    _add_files(digest, sorted([directory / "config.json", *directory.glob("*.index.json")]))
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        _add_samples(digest, path)
    return digest.hexdigest()


def _add_files(digest: hashlib._Hash, paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name}:{len(content)}:".encode() + content)


def _add_samples(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
