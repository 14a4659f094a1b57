"""What cells say of one another, over all calls that wrote into a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Cells = list[dict[str, Any]]


def with_scaling(cells: Sequence[dict[str, Any]]) -> Cells:
    """Beside each cell of several GPUs: how many times one GPU it is, and, where that held all banks, ``slowdown``: the
    compute time of a token's layers beside streaming over that without.
    """
    alone = {_kind(cell) + (cell["residency"],): cell for cell in cells if _is(cell, "scaling") and cell["gpus"] == 1}
    found = []
    for cell in cells:
        for residency in ("resident", "auto") if _is(cell, "scaling") and cell["gpus"] > 1 else ():
            one = alone.get(_kind(cell) + (residency,))
            if one is not None:
                cell = cell | {f"over_one_gpu_{residency}": cell["tokens_per_s"] / one["tokens_per_s"]}
                if residency == "resident":
                    slowdown = _compute_ms(cell) / _compute_ms(one)
                    cell |= {"slowdown": slowdown, "slowdown_layers": cell["layers"]}
        found.append(cell)
    return found


def with_envelope(cells: Sequence[dict[str, Any]], rate: str, ratio: str) -> Cells:
    """Beside each cell of capped memory its ``rate``, and so its MFU, over that of the same GPUs uncapped."""

    def key(cell: dict[str, Any]) -> tuple[Any, ...]:
        return (*_kind(cell), cell["gpus"], cell["tokens"])

    capped = [cell for cell in cells if _is(cell, "envelope") and rate in cell]
    most = {key(cell): cell for cell in sorted(capped, key=lambda cell: cell.get("hbm_gib", float("inf")))}
    return [
        cell | {ratio: cell[rate] / most[key(cell)][rate]}
        if any(cell is each for each in capped) and cell is not most[key(cell)]
        else cell
        for cell in cells
    ]


def _is(cell: dict[str, Any], part: str) -> bool:
    return cell.get("part") == part


def _kind(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("model", "precision", "layers"))


def _compute_ms(cell: dict[str, Any]) -> float:
    """Of one token of a sweep."""
    return float(cell["sweep_ms"] - cell.get("exposed_ms", 0.0)) / cell["sweep_tokens"]
