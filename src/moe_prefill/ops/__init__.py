"""One file an operation: a plain-torch reference, the checks, and the kernel where there is one."""

from .attention import Spans, attention
from .experts import combine, experts
from .grouped import grouped_mm
from .head import candidate_logits, vocabulary_scores
from .merge import merge_
from .rms_norm import rms_norm
from .rope import head_norm_rope, rope_tables
from .router import route
from .swiglu import swiglu

__all__ = [
    "Spans",
    "attention",
    "candidate_logits",
    "combine",
    "experts",
    "grouped_mm",
    "head_norm_rope",
    "merge_",
    "rms_norm",
    "rope_tables",
    "route",
    "swiglu",
    "vocabulary_scores",
]
