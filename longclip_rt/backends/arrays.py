"""What batches are given as, and what their vectors are gathered in: numpy arrays, or PyTorch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from longclip_rt.system.extras import require


class Arrays:
    """Batches and vectors as numpy arrays."""

    def given(self, batch: Any) -> Any:
        """A batch as the backend is to get it."""
        return batch

    def empty(self, rows: int, dim: int) -> Any:
        """Room for vectors [rows, dim] float32."""
        return np.empty((rows, dim), np.float32)

    def taken(self, vectors: Any) -> Any:
        """A batch's vectors [B, dim] as they go into that room."""
        return vectors


class Tensors(Arrays):
    """Batches and vectors as tensors on a GPU; without one, batches are arrays and vectors tensors on the CPU.

    Args:
        device: As PyTorch names it, such as `cuda:0`; empty: none.

    Raises:
        MissingExtraError: PyTorch is not installed.
    """

    def __init__(self, device: str) -> None:
        self._torch = require("torch", "export")
        self._device = device

    def given(self, batch: Any) -> Any:
        """A batch as the backend is to get it."""
        return self._torch.from_numpy(batch).to(self._device) if self._device else batch

    def empty(self, rows: int, dim: int) -> Any:
        """Room for vectors [rows, dim] float32."""
        return self._torch.empty((rows, dim), dtype=self._torch.float32, device=self._device or "cpu")

    def taken(self, vectors: Any) -> Any:
        """A batch's vectors [B, dim] as they go into that room."""
        return vectors if self._device else self._torch.from_numpy(vectors)
