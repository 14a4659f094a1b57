"""Cells as a picture: what a layer's time consists of, one bar a cell. Plain SVG, so that nothing else is needed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

COLOURS = {
    "attention": "#4c78a8",
    "experts": "#54a24b",
    "dense": "#eeca3b",
    "memory-bound": "#f58518",
    "exposed transfer": "#e45756",
    "gaps": "#bab0ac",
}
_WIDTH, _LEFT, _RIGHT, _BAR, _STEP, _TOP = 960, 250, 150, 24, 36, 56


def figure(cells: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG of the cells that have a breakdown, each with its tokens/s and MFU."""
    shown = [cell for cell in cells if cell.get("breakdown")]
    bars = "\n".join(_bar(cell, _TOP + index * _STEP) for index, cell in enumerate(shown))
    height = _TOP + len(shown) * _STEP + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>\n{_legend()}\n{bars}\n</svg>\n'
    )


def label(cell: dict[str, Any]) -> str:
    """What a cell is, in a few words."""
    shape = f"{cell['siblings']} siblings of {cell['tokens']:,}" if "siblings" in cell else f"{cell['tokens']:,} tokens"
    return f"{cell['model']} {cell['precision']}, {shape}"


def _legend() -> str:
    places = [(_LEFT + 118 * index, name) for index, name in enumerate(COLOURS)]
    return "\n".join(
        f'<rect x="{x}" y="28" width="12" height="12" fill="{COLOURS[name]}"/><text x="{x + 16}" y="39">{name}</text>'
        for x, name in places
    )


def _bar(cell: dict[str, Any], y: int) -> str:
    parts, total = cell["breakdown"]["ms"], sum(cell["breakdown"]["ms"].values())
    scale = (_WIDTH - _LEFT - _RIGHT) / total
    x, out = float(_LEFT), [f'<text x="8" y="{y + 16}">{escape(label(cell))}</text>']
    for name, colour in COLOURS.items():
        width = scale * parts.get(name, 0.0)
        out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}" stroke="#fff"/>')
        if width > 34:
            share = f"{parts[name] / total:.0%}"
            out.append(f'<text x="{x + width / 2:.1f}" y="{y + 16}" text-anchor="middle">{share}</text>')
        x += width
    mfu = f", {cell['mfu']:.1%}" if cell.get("mfu") else ""
    out.append(f'<text x="{_WIDTH - _RIGHT + 8}" y="{y + 16}">{cell["tokens_per_s"]:,.0f}/s{mfu}</text>')
    return "".join(out)
