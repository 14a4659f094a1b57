"""Our engine."""

from __future__ import annotations

from .files import run, tell

if __name__ == "__main__":
    from ..ours import run_ours

    run(lambda job: run_ours(job, tell))
