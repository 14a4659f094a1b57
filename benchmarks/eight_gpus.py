"""The paper's table on 4 and 8 GPUs: Qwen3-235B-A22B in FP8, one call for each number of GPUs.

    python benchmarks/eight_gpus.py --predict-only --gpus 8  # no GPU: eight_gpus_predicted.json; likewise --gpus 4
    python benchmarks/eight_gpus.py --gpus 8
    python benchmarks/eight_gpus.py --gpus 8 --parts strategies --skews 1 --run-tokens 65536  # one of several calls

asyncep, sharded and hybrid, against the five baselines, balanced and at skew 16; the aggregated workload under dp+ep,
and under asyncep with vLLM's balancer and with our frontend; peer pulls, all at once or one alone, sliced or not,
staggered or not; and scaling, for as many layers as are resident on one GPU, and of the whole model against one GPU
that offloads. How it is measured is said in ``two_gpu.py``, with which this shares all code.
"""

from many_gpus.main import main

if __name__ == "__main__":
    main(__doc__, gpus=8, model="Qwen3-235B-A22B", quantization="fp8", out="benchmarks/results/eight_gpus.json")
