"""One file an operation: a plain-torch reference, the checks, and the kernel where there is one."""

from .attention import Spans, attention
from .block_experts import BlockBank, aligned_rows, blocks_refused
from .block_linear import Float8Blocks, block_linear_kernel, block_linear_refused
from .expert_rows import chosen as experts_kernel
from .expert_rows import explain as explain_experts
from .experts import combine, experts
from .flash import chosen as flash_kernel
from .flash import explain as explain_flash
from .grouped import grouped_mm, has_float8, scaled_grouped_mm
from .head import candidate_logits, vocabulary_scores
from .linear import Matrix, linear, linear_add_rms_norm_, rms_norm_for
from .merge import merge_
from .permute import ExpertOrder, order_by_expert, permute, permute_quantize
from .quantize import (
    BLOCK,
    FLOAT8,
    dequantize,
    dequantize_blocks,
    quantize_blocks,
    quantize_groups,
    quantize_rows,
    swiglu_quantize,
)
from .rms_norm import NormInto, add_rms_norm, add_rms_norm_, rms_norm, rms_norm_quantize
from .rope import head_norm_rope, rope_tables
from .router import route, top_k_weights
from .rows import Float8Rows, Rows
from .swiglu import swiglu

__all__ = [
    "BLOCK",
    "FLOAT8",
    "BlockBank",
    "ExpertOrder",
    "Float8Blocks",
    "Float8Rows",
    "Matrix",
    "NormInto",
    "Rows",
    "Spans",
    "add_rms_norm",
    "add_rms_norm_",
    "aligned_rows",
    "attention",
    "block_linear_kernel",
    "block_linear_refused",
    "blocks_refused",
    "candidate_logits",
    "combine",
    "dequantize",
    "dequantize_blocks",
    "experts",
    "experts_kernel",
    "explain_experts",
    "explain_flash",
    "flash_kernel",
    "grouped_mm",
    "has_float8",
    "head_norm_rope",
    "linear",
    "linear_add_rms_norm_",
    "merge_",
    "order_by_expert",
    "permute",
    "permute_quantize",
    "quantize_blocks",
    "quantize_groups",
    "quantize_rows",
    "rms_norm",
    "rms_norm_for",
    "rms_norm_quantize",
    "rope_tables",
    "route",
    "scaled_grouped_mm",
    "swiglu",
    "swiglu_quantize",
    "top_k_weights",
    "vocabulary_scores",
]
