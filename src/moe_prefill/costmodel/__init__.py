"""FLOPs, bytes and seconds of a sweep, part by part, and the saturation threshold T. Torch-free."""

from .batch import Batch, Rows, runs_of
from .flops import LayerFlops, batch_flops, layer_flops, sweep_flops
from .predict import SweepPrediction, predict_sweep
from .saturation import Saturation, Window, saturation, tightest_window
from .seconds import head_seconds, layer_seconds
from .strategies import StrategyPrediction, busiest_rank, predict_strategy, ranks_a_row
from .streaming import RESIDENT, BankCopy, Peer, Streaming, bank_copies, exposure
from .work import PARTS, Part, Work, head_work, layer_work

__all__ = [
    "PARTS",
    "RESIDENT",
    "BankCopy",
    "Batch",
    "LayerFlops",
    "Part",
    "Peer",
    "Rows",
    "Saturation",
    "StrategyPrediction",
    "Streaming",
    "SweepPrediction",
    "Window",
    "Work",
    "bank_copies",
    "batch_flops",
    "busiest_rank",
    "exposure",
    "head_seconds",
    "head_work",
    "layer_flops",
    "layer_seconds",
    "layer_work",
    "predict_strategy",
    "predict_sweep",
    "ranks_a_row",
    "runs_of",
    "saturation",
    "sweep_flops",
    "tightest_window",
]
