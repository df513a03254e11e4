"""Tests import the top-level files; one torch thread, because spinning threads slow each other; and
a warning that one of our own files raises is an error."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    import torch
except ModuleNotFoundError:  # the environments need no torch
    pass
else:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """A GPU is seen by test_cuda.py alone: the others demand numbers that a CPU repeats exactly."""
    if request.module.__name__ != "test_cuda" and "torch" in sys.modules:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


OURS = [path.stem for folder in (".", "notebooks", "tests", "tests/benchmarks")
        for path in sorted((ROOT / folder).glob("*.py"))]


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", rf"error:::(notebooks\.)?({'|'.join(OURS)})$")
