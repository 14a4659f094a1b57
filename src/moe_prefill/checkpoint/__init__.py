"""Checkpoints as audited streams of named pieces: bytes and tensors, never a model class."""

from .dummy import dummy_slots
from .headers import Checkpoint, TensorEntry, open_checkpoint
from .loader import audit, load_slots
from .reader import same_values
from .resolve import pinned_revision, read_config, resolve_directory
from .scales import with_scales
from .slots import Allocate, Keep, kept_ranges

__all__ = [
    "Allocate",
    "Checkpoint",
    "Keep",
    "TensorEntry",
    "audit",
    "dummy_slots",
    "kept_ranges",
    "load_slots",
    "open_checkpoint",
    "pinned_revision",
    "read_config",
    "resolve_directory",
    "same_values",
    "with_scales",
]
