"""This family's tensors carry transformers' names, in every release."""

from __future__ import annotations

spelling = str
