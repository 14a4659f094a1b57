"""asyncep and the five baselines on two GPUs, same weights and token ids, each with its own best sweep and chunk sizes.

    python benchmarks/two_gpu.py --predict-only  # no GPU: asyncep_2xh200_predicted.json

Predictions for every cell are written before anything runs, with rates that are measured first (``--profile`` names
earlier ones, ``--estimated`` takes the datasheet's). One process a GPU. Dummy weights; the last layer runs in full; no
sharing but in the aggregated workload. Of each strategy the settings that are predicted to be best are run once to warm
up and once timed, and the fastest is measured (``--search 1``: the first at once): warm up until two runs agree within
2%, then the median of ``--least-runs``, or of two that take 15 s. A run begins when all ranks are ready and ends when
the last one has its answers; a pipeline, which is filled and drained in each, is given runs of twice the tokens.

Parts: ``strategies`` (also of mixed lengths: as many tokens in requests of 256 as of 4K and 32K); ``vllm`` (its TP, EP
and PP, each in a process of its own, ``--peer-site`` names its packages; the best counts); ``transports`` (copy engines
against NCCL, in large sweeps and in sweeps of T); ``scaling``; ``envelope`` (a card of ``--envelope-gib`` against the
whole one, on one GPU and on all; needs 182 GiB of host memory); ``aggregated`` (dp+ep as a job and under vLLM's
balancer, asyncep under that and under our frontend, PrefillOnly's scheduler over dp+ep and pp+pp); ``pulls``.

Everything at once takes hours. These calls take three to eight minutes each by prediction (``predicted_call_s`` in the
file of predictions says what each should take, and each prints it); the most important first. The results file keeps
the cells of other calls and is written behind every strategy, so a call that is cut off loses one. Calls with ``vllm``
need ``--peer-site FOLDER``, where vLLM is not in this environment. A ratio is always one of the same call.

    P="python benchmarks/two_gpu.py --search 1" Q="--model Qwen3-235B-A22B --quantization fp8 --run-tokens 65536"
    S="--strategies asyncep --residencies sharded --skews 1" B="--skews 1 --residencies sharded --estimated"
    $P --parts strategies,scaling --skews 1 --residencies sharded --tokens 256,4096,32768
    $P --parts strategies,vllm $S --tokens 4096,32768 --run-tokens 65536 --peer-strategies pp
    $P --parts strategies,transports,scaling $Q $S --tokens 4096 --estimated
    $P --parts envelope $Q --tokens 4096 --host-gib 230 --estimated
    $P --parts strategies $B --tokens mixed
    $P --parts aggregated --least-runs 2 --scale 0.05 --estimated
    $P --parts strategies,vllm $S --tokens 4096,32768 --run-tokens 65536 --peer-strategies tp
    $P --parts strategies,vllm $S --tokens 4096,32768 --run-tokens 65536 --peer-strategies ep
    $P --parts strategies $Q $B --tokens 4096
    $P --parts strategies $Q --strategies asyncep --residencies hybrid --skews 1 --tokens 4096,32768 --estimated
    $P --parts strategies --skews 16 --residencies sharded --tokens 256,4096,32768 --estimated
    $P --parts strategies $B --tokens 131072
    $P --parts strategies,vllm $Q $S --tokens 4096,32768 --peer-strategies pp --estimated
    $P --parts strategies,vllm $Q $S --tokens 4096,32768 --peer-strategies tp --estimated

Logits against a resident engine and the loss of a worker are tests: ``pytest tests/gpu/test_workers.py
tests/gpu/test_stream_groups.py tests/gpu/test_strategies.py``, of which those that need two GPUs skip on one.
"""

from many_gpus.main import main

if __name__ == "__main__":
    main(__doc__, gpus=2, model="Qwen3-30B-A3B", quantization=None, out="benchmarks/results/asyncep_2xh200.json")
