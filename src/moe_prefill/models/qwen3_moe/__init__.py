"""Qwen3-MoE: q and k normalised per head, every layer sparse unless the config says otherwise."""
