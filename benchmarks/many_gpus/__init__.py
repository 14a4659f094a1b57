"""asyncep and the five baselines on several GPUs: what ``two_gpu.py`` and ``eight_gpus.py`` share."""
