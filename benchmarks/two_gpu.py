"""asyncep and the five baselines on two GPUs, same weights and token ids, each with its own best sweep and chunk sizes.

    python benchmarks/two_gpu.py --predict-only  # no GPU: asyncep_2xh200_predicted.json
    python benchmarks/two_gpu.py  # Qwen3-30B-A3B in BF16
    python benchmarks/two_gpu.py --model Qwen3-235B-A22B --quantization fp8 --parts strategies --skews 1 --tokens 4096

Predictions for every cell are written before anything runs, with rates that are measured first (``--profile`` names
earlier ones). One process a GPU. Dummy weights; the last layer runs in full; no sharing but in the aggregated workload.
Of each strategy the settings that are predicted to be best are run once to warm up and once timed; the fastest is then
measured: warm up until two runs agree within 2%, then the median of ``--least-runs``. A run begins when all ranks are
ready and ends when the last one has its answers; a pipeline, which is filled and drained in each, is given runs of
twice the tokens. The results file keeps the cells of other calls; it is written behind every strategy.
"""

from many_gpus.main import main

if __name__ == "__main__":
    main(__doc__, gpus=2, model="Qwen3-30B-A3B", quantization=None, out="benchmarks/results/asyncep_2xh200.json")
