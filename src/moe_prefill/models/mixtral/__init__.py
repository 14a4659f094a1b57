"""Mixtral: every layer sparse, routing weights kept in float32, one window for all layers."""
