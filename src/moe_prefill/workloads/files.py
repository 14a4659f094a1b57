"""Workloads in files: traces in Mooncake's JSONL format, and tables for the commands that read token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

import numpy as np

from ..core import AtomicRequest
from ..errors import InputError
from .sources import VOCAB_SIZE
from .workload import Workload

TRACE_BLOCK_TOKENS = 512  # Mooncake's


def write_trace(workload: Workload, path: str | Path, *, block_tokens: int = TRACE_BLOCK_TOKENS) -> None:
    """One line a request: ``timestamp`` (ms), ``input_length``, ``output_length`` (1) and ``hash_ids``, a number for
    every block of tokens, the last one possibly short; equal numbers mean equal prefixes up to there.
    """
    numbers: dict[tuple[int, bytes], int] = {}
    with Path(path).open("w", encoding="utf-8") as file:
        for request, arrival_s in zip(workload.requests, workload.arrival_s.tolist(), strict=True):
            ids, parent = [], -1
            for begin in range(0, len(request.tokens), block_tokens):
                block = request.tokens[begin : begin + block_tokens].tobytes()
                parent = numbers.setdefault((parent, block), len(numbers))
                ids.append(parent)
            line = {"timestamp": round(1000 * arrival_s), "input_length": len(request.tokens), "output_length": 1}
            file.write(json.dumps({**line, "hash_ids": ids}) + "\n")


def read_trace(path: str | Path, *, block_tokens: int = TRACE_BLOCK_TOKENS) -> Workload:
    """Requests of the lengths, arrivals and shared prefixes of a trace; their tokens are made up from the numbers of
    the blocks. InputError names the first line that is wrong.
    """
    requests, arrivals = [], []
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                about = json.loads(line)
                length, ids = int(about["input_length"]), [int(each) for each in about["hash_ids"]]
                arrivals.append(float(about["timestamp"]) / 1000)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
            if length < 1 or len(ids) != -(-length // block_tokens):
                raise InputError(
                    f"{path}, line {number}: {length} tokens in {len(ids)} blocks; blocks have {block_tokens} tokens"
                )
            tokens = np.concatenate([_block(each, block_tokens) for each in ids])[:length]
            requests.append(AtomicRequest.candidates(tokens, [0, 1]))
    order = np.argsort(arrivals, kind="stable").tolist()
    return Workload(
        Path(path).stem,
        [requests[index] for index in order],
        ["trace"] * len(order),
        np.asarray([arrivals[index] for index in order], np.float64),
    )


def _opened(path: str | Path) -> IO[str]:
    try:
        return Path(path).open(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _block(number: int, block_tokens: int) -> np.ndarray:
    return np.random.default_rng([number, block_tokens]).integers(0, VOCAB_SIZE, block_tokens, dtype=np.int32)


def write_table(workload: Workload, path: str | Path) -> None:
    """A Parquet table for ``moe-prefill score`` with token_ids_column and candidate_ids_column: ``id``, ``source``,
    ``token_ids``, ``positions``, ``candidate_ids`` (one list an asked position).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pa.list_(pa.int32())
    columns = {
        "id": pa.array(range(len(workload.requests)), pa.int64()),
        "source": pa.array(workload.sources, pa.string()),
        "token_ids": pa.array([request.tokens for request in workload.requests], ids),
        "positions": pa.array([request.positions for request in workload.requests], ids),
        "candidate_ids": pa.array(
            [np.split(request.ids, request.id_offsets[1:-1]) for request in workload.requests], pa.list_(ids)
        ),
    }
    pq.write_table(pa.table(columns), path)
