"""Standard input kept in a file, because a job reads its input twice and may be resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO

from .durable import write_durably


def spool(stream: IO[bytes], path: Path) -> Path:
    """Copy a stream to ``path``, or, where a resumed job has it complete already, leave the stream unread."""
    if not path.exists():
        write_durably(path, lambda file: shutil.copyfileobj(stream, file, 1 << 20))
    return path
