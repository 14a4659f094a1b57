"""Shared set-up: quiet third-party libraries, and Triton's interpreter where there is no GPU."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Tests run side by side, and their models are tiny: threads would only wait for one another.
torch.set_num_threads(1)
