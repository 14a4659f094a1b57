"""How a side gets its job and hands back its cells."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import MoePrefillError
from ..job import Job


def run(work: Callable[[Job], Sequence[dict[str, Any]]]) -> None:
    """Read the job of the command line, do the work, write the cells. A user's error is told without a traceback."""
    given, found = map(Path, sys.argv[1:3])
    try:
        cells = work(Job.load(given))
    except MoePrefillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    partial = found.with_suffix(".partial")
    partial.write_text(json.dumps(list(cells)), encoding="utf-8")
    partial.rename(found)  # who waits for the file finds it whole


def tell(cell: dict[str, Any]) -> None:
    """A line as soon as a cell is done, without the long parts."""
    print(json.dumps({key: value for key, value in cell.items() if key != "breakdown"}), file=sys.stderr, flush=True)
