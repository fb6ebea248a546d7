"""The PCA head of a tower: pooled states to embeddings and their PCA in one matrix product with plain operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longclip_rt.metrics import EPS
from longclip_rt.pca.basis import Basis


class PcaHead(nn.Module):
    """Pooled states h [B, W] to the embedding z = h P / |h P| [B, D] and to its PCA.

    With the matrix Q = V [D, K], or Q = V V' [D, D] to reconstruct, the PCA is z Q less a constant row, and z Q is
    h (P Q) / |h P|. So one product with [P | P Q] gives both, and what follows acts on each row alone.

    Attributes:
        weight: [P | P Q], [W, D + K] or [W, 2 D]; in the tower's dtype.
        shift: What is subtracted, float32 whatever the tower's dtype: mean Q, or mean Q - mean to reconstruct.
    """

    weight: Tensor

    def __init__(self, projection: Tensor, basis: Basis, mode: str) -> None:
        """Computes the product of the weights in float64.

        Args:
            projection: P, [W, D].
            basis: Mean [D] and components V [D, K].
            mode: `project` or `reconstruct`.
        """
        super().__init__()
        components = torch.from_numpy(basis.components)
        mean = torch.from_numpy(basis.mean)
        exact = projection.detach().double()
        matrix = components if mode == "project" else components @ components.T
        self.dim = basis.dim
        self.register_buffer("weight", torch.cat([exact, exact @ matrix], dim=1).to(projection.dtype))
        # Not a buffer, since `.half()` would round it: it is subtracted from what may be close to it.
        self.shift = (mean @ matrix - (0 if mode == "project" else mean)).float()

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Maps pooled states [B, W] of any float dtype to (z [B, D], its PCA [B, K] or [B, D]).

        Both are float32 and of length 1.
        """
        both = (pooled.to(self.weight.dtype) @ self.weight).float()  # [B, D + K]
        embedding, product = both[:, : self.dim], both[:, self.dim :]
        length = torch.linalg.vector_norm(embedding, dim=-1, keepdim=True).clamp_min(EPS)
        return embedding / length, F.normalize(product / length - self.shift, dim=-1)
