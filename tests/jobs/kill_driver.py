"""A job in its own process, to be killed: python kill_driver.py INPUT OUTPUT PAUSE_S [--resume]."""

import sys
from pathlib import Path

from fakes import FakeEngine
from helpers import run

if __name__ == "__main__":
    source, output, pause_s, *flags = sys.argv[1:]
    run(
        source, Path(output), engine=FakeEngine(pause_s=float(pause_s)), label_column="gold", resume="--resume" in flags
    )
