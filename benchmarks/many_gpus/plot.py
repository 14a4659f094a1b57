"""Cells of strategies as a picture: tokens/s of each beside the others, measured as bars, predicted as ticks. Plain
SVG.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

COLOURS = {
    "asyncep sharded": "#4c78a8",
    "asyncep hybrid": "#9ecae9",
    "dp+ep": "#f58518",
    "dp+tp": "#ffbf79",
    "tp+ep": "#54a24b",
    "tp+tp": "#88d27a",
    "pp+pp": "#b279a2",
}
PEER = "#e45756"
_WIDTH, _LEFT, _BAR, _GAP, _TOP = 960, 210, 13, 14, 44


def figure(cells: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG of the strategies' cells, grouped by GPUs, skew and length. A cell without ``tokens_per_s`` is only
    predicted, and drawn as an outline.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell.get("part") in ("strategies", "vllm") and (_measured(cell) or _predicted(cell)):
            key = (f"{cell['model']} {cell['precision']}", cell["gpus"], cell["dummy_skew"], cell["tokens"])
            groups.setdefault(key, []).append(cell)
    y, parts = float(_TOP), []
    for (model, gpus, skew, tokens), members in sorted(groups.items(), key=lambda each: _order(each[0])):
        most = max(max(_measured(cell), _predicted(cell)) for cell in members)
        for line, words in enumerate((model, f"{gpus} GPUs, {_shown(tokens)} tokens, skew {skew:g}")):
            parts.append(f'<text x="8" y="{y + 12 + 14 * line}">{escape(words)}</text>')
        for cell in members:
            parts.append(_bar(cell, y, most))
            y += _BAR + 2
        y += _GAP + max(0, 2 - len(members)) * _BAR
    head = f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>'
    note = '<text x="8" y="34" fill="#555">tokens/s; filled: measured, outlined or tick: predicted</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y:.0f}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="100%" height="100%" fill="#fff"/>\n{head}{note}\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _shown(tokens: int | str) -> str:
    return f"{tokens:,}" if isinstance(tokens, int) else tokens


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lengths by size, mixed ones last."""
    *first, tokens = key
    return (*first, isinstance(tokens, str), tokens)


def _measured(cell: dict[str, Any]) -> float:
    """Of a peer's cell the peer's: ours is another bar."""
    return float(cell.get("peer_tokens_per_s" if "peer" in cell else "tokens_per_s", 0.0))


def _predicted(cell: dict[str, Any]) -> float:
    return float(cell.get("predicted_peer_tokens_per_s" if "peer" in cell else "predicted_tokens_per_s", 0.0))


def _bar(cell: dict[str, Any], y: float, most: float) -> str:
    name = " ".join(filter(None, (cell["strategy"], cell.get("residency"))))
    name = f"vLLM {cell['peer_strategy']}" if "peer" in cell else name
    colour, scale = COLOURS.get(name, PEER), (_WIDTH - _LEFT - 230) / most
    width, tick = scale * (_measured(cell) or _predicted(cell)), _LEFT + scale * _predicted(cell)
    fill = f'fill="{colour}"' if _measured(cell) else f'fill="none" stroke="{colour}"'
    out = [f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" {fill}/>']
    if _measured(cell) and _predicted(cell):
        out.append(f'<line x1="{tick:.1f}" x2="{tick:.1f}" y1="{y}" y2="{y + _BAR}" stroke="#000"/>')
    rate, mfu = (
        _measured(cell) or _predicted(cell),
        None if "peer" in cell else cell.get("mfu") or cell.get("predicted_mfu"),
    )
    words = f"{name} {rate:,.0f}" + (f", MFU {mfu:.1%}" if mfu else "")
    out.append(f'<text x="{_LEFT + width + 6:.1f}" y="{y + 10.5}">{escape(words)}</text>')
    return "".join(out)
