"""A part of a trace as an SVG: copies in one row, compute and its waiting in the row below.

python benchmarks/trace_figure.py trace.json --begin-ms 1900 --ms 260 --out docs/trace.svg
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, ROW, TOP = 960, 80, 34, 24
COLOURS = {"bank": "#7aa6d8", "layer": "#8fc08f", "wait": "#d98880"}


def bar(event: dict[str, Any], begin: float, scale: float) -> str:
    """One event as a rectangle with its name, if there is room for it."""
    kind = event["name"].split()[0]
    row = TOP + (0 if kind == "bank" else ROW + 10)
    x, width = LEFT + (event["ts"] / 1e3 - begin) * scale, event["dur"] / 1e3 * scale
    left, right = max(x, LEFT), min(x + width, WIDTH - 10)
    if right - left < 0.5:
        return ""
    name = escape(event["name"].replace("wait for bank", "wait"))
    text = f'<text x="{(left + right) / 2:.1f}" y="{row + 21}" text-anchor="middle">{name}</text>'
    size = f'x="{left:.1f}" y="{row}" width="{right - left:.1f}" height="{ROW}"'
    box = f'<rect {size} fill="{COLOURS[kind]}" stroke="#fff"/>'
    return box + (text if right - left > 6.5 * len(name) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--begin-ms", type=float, required=True)
    parser.add_argument("--ms", type=float, default=260)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    events = [event for event in json.loads(options.trace.read_text()) if event.get("ph") == "X"]
    scale = (WIDTH - LEFT - 10) / options.ms
    bars = "\n".join(filter(None, (bar(event, options.begin_ms, scale) for event in events)))
    ticks = "\n".join(
        f'<text x="{LEFT + ms * scale:.1f}" y="{TOP + 2 * ROW + 28}" text-anchor="middle">{ms} ms</text>'
        for ms in range(0, int(options.ms) + 1, 20)
    )
    options.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {TOP + 2 * ROW + 40}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f'<text x="8" y="{TOP + 21}">copies</text><text x="8" y="{TOP + ROW + 31}">compute</text>\n'
        f"{bars}\n{ticks}\n</svg>\n"
    )


if __name__ == "__main__":
    main()
