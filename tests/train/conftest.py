from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_case import write_pairs
from train_case import clip_weights


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 pairs, of which 8 validate, and weights to begin with."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("material")
    write_pairs(folder / "pairs", 80)
    clip_weights(folder / "clip.safetensors")
    return folder
