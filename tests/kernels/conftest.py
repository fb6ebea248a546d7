"""The kernels' numbers are tested twice: in Triton's interpreter on the CPU, and on a GPU by `make test-gpu`.

The interpreter is chosen by the environment before Triton is first imported, which the other tests must not have. So a
plain run of pytest collects only `test_interpreted.py`, which starts the rest in a process of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = os.environ.get("LONGCLIP_RT_TEST_GPU") == "1"

_NUMBERS = ["test_pca_head.py", "test_launch.py"]
collect_ignore = ["test_interpreted.py", "test_aot.py"] if INTERPRETED or ON_GPU else _NUMBERS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU:
        for item in items:  # of every folder that was named
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if INTERPRETED:
        torch.set_num_threads(2)
        return torch.device("cpu")
    assert torch.cuda.is_available(), "make test-gpu needs an NVIDIA GPU and a PyTorch that sees it"
    return torch.device("cuda")
