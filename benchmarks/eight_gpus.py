"""The paper's table on 4 and 8 GPUs: Qwen3-235B-A22B in FP8.

    python benchmarks/eight_gpus.py --predict-only --gpus 8  # no GPU: eight_gpus_predicted.json; likewise --gpus 4

asyncep, sharded and hybrid, against the five baselines, balanced and at skew 16; vLLM's own strategies; the aggregated
workload; peer pulls, all at once or one alone, sliced or not, staggered or not; and scaling, for as many layers as are
resident on one GPU, and of the whole model against one GPU that offloads. Parts and how they are measured are said in
``two_gpu.py``, with which this shares all code.

The calls that make up a run, each predicted below ten minutes on 8 GPUs, the most important first:

    P="python benchmarks/eight_gpus.py --gpus 8 --search 1 --run-tokens 65536"
    S="--strategies asyncep --residencies sharded --skews 1 --estimated" B="--residencies sharded --estimated"
    $P --parts strategies --skews 1 --residencies sharded --tokens 4096
    $P --parts scaling,pulls,transports --tokens 4096 --estimated
    $P --parts strategies --skews 1 $B --tokens 32768 --strategies asyncep,dp+ep,tp+ep,pp+pp
    $P --parts aggregated --least-runs 2 --scale 0.05 --tiers dp+ep:vllm,asyncep:vllm,asyncep:ours --estimated
    $P --parts strategies --skews 1 $B --tokens 256
    $P --parts strategies --skews 16 $B --tokens 4096
    $P --parts strategies,vllm $S --tokens 4096 --peer-strategies pp
    $P --parts strategies,vllm $S --tokens 4096 --peer-strategies ep
    $P --parts strategies --skews 1 $B --tokens mixed --strategies asyncep,dp+ep,pp+pp
    $P --parts strategies --skews 16 $B --tokens 256
    $P --parts strategies --skews 1 $B --tokens 131072 --strategies asyncep,dp+ep --warm-up 0
    $P --parts strategies --skews 1 $B --tokens 131072 --strategies pp+pp --warm-up 0 --least-runs 1

vLLM cannot cut experts of 1,536 channels in blocks of 128 over 8 GPUs, so there it has no ``tp``.
"""

from many_gpus.main import main

if __name__ == "__main__":
    main(__doc__, gpus=8, model="Qwen3-235B-A22B", quantization="fp8", out="benchmarks/results/eight_gpus.json")
