"""Tests import the top-level files; one torch thread, because spinning threads slow each other."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

try:
    import torch
except ModuleNotFoundError:  # the environments need no torch
    pass
else:
    torch.set_num_threads(1)
