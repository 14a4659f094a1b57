"""Qwen2-MoE and Qwen1.5-MoE: a gated shared expert beside the routed ones, biases on q, k and v."""
