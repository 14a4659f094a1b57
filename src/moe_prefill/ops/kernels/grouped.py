"""Grouped matrix product for the dtypes and shapes that torch's own does not take. R rows, C input, N output
channels, E groups.

Each program walks the groups to find which rows its tile holds, so nothing is read on the host. A group's last tile
is masked. Float8 matrices are widened a tile at a time by shifting bits, which GPUs without float8 units can do, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _grouped_mm_kernel(
    rows_ptr,
    weight_ptr,
    scale_ptr,
    ends_ptr,
    out_ptr,
    scale_group_stride,
    weight_group_stride,
    weight_row_stride,
    E,
    N,
    C: tl.constexpr,
    FLOAT8: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile = tl.program_id(0)
    # Which group holds this row tile: groups contribute ceil(rows / ROWS) tiles each.
    group = tile * 0  # a tensor, not a constant: it changes in the loop
    begin, tiles = group, group
    end = tl.load(ends_ptr)
    more = tl.cdiv(end, ROWS)
    while (group < E - 1) & (tile >= more):
        group += 1
        begin = end
        end = tl.load(ends_ptr + group)
        tiles = more
        more += tl.cdiv(end - begin, ROWS)
    if tile < more:
        row = begin + (tile - tiles) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLS + tl.arange(0, COLS)
        row_inside, column_inside = row < end, column < N
        base = weight_ptr + group.to(tl.int64) * weight_group_stride
        total = tl.zeros([ROWS, COLS], dtype=tl.float32)
        for first in range(0, C, DEPTH):
            depth = first + tl.arange(0, DEPTH)
            inside = depth < C
            x = tl.load(
                rows_ptr + row.to(tl.int64)[:, None] * C + depth[None, :],
                mask=row_inside[:, None] & inside[None, :],
                other=0.0,
            )
            w = tl.load(
                base + column.to(tl.int64)[None, :] * weight_row_stride + depth[:, None],
                mask=column_inside[None, :] & inside[:, None],
                other=0,
            )
            if FLOAT8:
                # e4m3 in the exponent and mantissa of a float16 is too small by 2^8; subnormal values come out right.
                bits = w.to(tl.uint16)
                half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
                w = (half.to(tl.float32) * 256.0).to(x.dtype)
            total = tl.dot(x, w, total, input_precision="ieee")
        if FLOAT8:
            scale = tl.load(scale_ptr + group.to(tl.int64) * scale_group_stride + column, mask=column_inside, other=0.0)
            total *= scale[None, :]
        target = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(target, total.to(out_ptr.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


def grouped_mm_kernel(
    rows_RC: torch.Tensor, weight_ENC: torch.Tensor, ends_E: torch.Tensor, scale_EN: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows ``ends[e - 1]:ends[e]`` times ``weight[e]`` transposed; [R, N], accumulated in float32. Float8 matrices come
    with a ``scale_EN`` for each of their rows.
    """
    (R, C), (E, N, _) = rows_RC.shape, weight_ENC.shape
    assert rows_RC.is_contiguous(), rows_RC.stride()
    assert weight_ENC.stride(2) == 1, weight_ENC.stride()
    assert (scale_EN is not None) == (weight_ENC.itemsize == 1), weight_ENC.dtype
    assert scale_EN is None or scale_EN.stride(1) == 1, scale_EN
    out = torch.empty(R, N, dtype=rows_RC.dtype, device=rows_RC.device)
    if R:
        tile_rows, tile_cols, depth = 64, 64, 32
        grid = (triton.cdiv(R, tile_rows) + E, triton.cdiv(N, tile_cols))
        _grouped_mm_kernel[grid](
            rows_RC,
            weight_ENC if scale_EN is None else weight_ENC.view(torch.uint8),
            scale_EN,
            ends_E,
            out,
            0 if scale_EN is None else scale_EN.stride(0),
            weight_ENC.stride(0),
            weight_ENC.stride(1),
            E,
            N,
            C=C,
            FLOAT8=scale_EN is not None,
            ROWS=tile_rows,
            COLS=tile_cols,
            DEPTH=depth,
            num_warps=4,
        )
    return out
