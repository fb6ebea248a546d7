"""Long-CLIP's training loss: image against long caption, and the image's primary components against the short one.

Features come in as the towers' projections, not yet of length 1; all of the loss is computed in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger("longclip_rt")

COMPONENTS = 32
"""Principal components that the coarse branch keeps (reference code; the paper, section 3.2, leaves it open)."""

LABEL_SMOOTHING = 0.1
"""As in the reference code."""

# Two eigenvalues nearer than this share of the largest count as this far apart in the gradient. float32 knows an
# eigenvalue to about 1e-7 of the largest, so that a smaller gap is noise, and its reciprocal a gradient without bound.
_SMALLEST_GAP = 1e-4


def longclip_loss(
    image_features: Tensor,
    long_features: Tensor,
    short_features: Tensor,
    logit_scale: Tensor,
    components: int = COMPONENTS,
    label_smoothing: float = LABEL_SMOOTHING,
) -> Tensor:
    """Long-CLIP's loss of one batch on one device (arXiv 2403.15378, section 3.2).

    Args:
        image_features: [B, D], any float dtype, not normalised; row i belongs to row i of the texts.
        long_features: [B, D] of the long captions.
        short_features: [B, D] of the short captions.
        logit_scale: Scalar, the logarithm of the inverse temperature.
        components: Principal components of the image features that the short captions are matched with.
        label_smoothing: Share of the target that is spread over all rows.

    Returns:
        Scalar float32: the sum of both branches' losses.
    """
    objective = Objective("longclip", components, label_smoothing)
    fine, coarse = branch_losses(objective, image_features, long_features, short_features, logit_scale)
    return fine + coarse


@dataclass(frozen=True)
class Objective:
    """What is matched with what.

    Attributes:
        name: `longclip` matches images with long captions and, after PCM, with short ones; `long+short` leaves PCM
            out, `long` the short branch too; `clip` is `long` for captions of 77 tokens.
        components: Principal components that PCM keeps.
        label_smoothing: Share of the target that is spread over all rows.
        pcm_scope: Whether PCM runs on each process's own rows, as in the reference, or on all of them.
    """

    name: Literal["longclip", "long+short", "long", "clip"] = "longclip"
    components: int = COMPONENTS
    label_smoothing: float = LABEL_SMOOTHING
    pcm_scope: Literal["local", "global"] = "local"

    @property
    def has_short_branch(self) -> bool:
        """Whether the short captions are used."""
        return self.name in ("longclip", "long+short")


def branch_losses(
    objective: Objective,
    image_features: Tensor,
    long_features: Tensor,
    short_features: Tensor | None,
    logit_scale: Tensor,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> tuple[Tensor, Tensor]:
    """Both branches' losses of a batch that may be spread over processes.

    Args:
        objective: What is matched with what.
        image_features: This process's [b, D], any float dtype, not normalised.
        long_features: [b, D] of the long captions.
        short_features: [b, D] of the short captions; None without a short branch.
        logit_scale: Scalar, the logarithm of the inverse temperature.
        gather: Joins all processes' rows, [b, D] to [B, D].

    Returns:
        The loss against long captions and that against short ones (0 without that branch), scalars float32.
    """
    image = normalized(image_features)
    all_images = gather(image)
    fine = contrastive_loss(all_images, gather(normalized(long_features)), logit_scale, objective.label_smoothing)
    if not objective.has_short_branch:
        return fine, torch.zeros_like(fine)
    assert short_features is not None
    coarse = all_images
    if objective.name == "longclip":
        if objective.pcm_scope == "global":
            coarse = pcm_reconstruct(all_images, objective.components)
        else:
            coarse = gather(pcm_reconstruct(image, objective.components))
    short = gather(normalized(short_features))
    return fine, contrastive_loss(coarse, short, logit_scale, objective.label_smoothing)


def normalized(features: Tensor) -> Tensor:
    """Scales rows [B, D] of any float dtype to length 1, in float32."""
    return F.normalize(features.float(), dim=-1)


def contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, label_smoothing: float = LABEL_SMOOTHING
) -> Tensor:
    """The mean of both directions' cross entropy (CLIP, arXiv 2103.00020, figure 3), with label smoothing.

    Args:
        image: [B, D] float32, used as it is: the coarse branch's reconstruction is not of length 1.
        text: [B, D] float32.
        logit_scale: Scalar, the logarithm of what similarities are multiplied by.
        label_smoothing: Share of the target that is spread over all rows.

    Returns:
        Scalar float32.
    """
    with _no_autocast(image):
        logits = logit_scale.float().exp() * image @ text.T  # [B, B]
    target = torch.arange(len(logits), device=logits.device)
    by_image = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    by_text = F.cross_entropy(logits.T, target, label_smoothing=label_smoothing)
    return (by_image + by_text) / 2


def pcm_reconstruct(features: Tensor, components: int = COMPONENTS) -> Tensor:
    """Rebuilds features from the batch's first principal components: primary component matching (section 3.2).

    The batch's mean is taken off, what is left is projected on its first right singular vectors, and the mean added
    back; the result is not scaled to length 1. Gradients flow through the choice of the vectors too. The projection's
    derivative depends on the gaps between kept and dropped eigenvalues (squared singular values) only, not on those
    among the kept ones, at which the derivative of a decomposition breaks down too. It is exact where these gaps are
    at least 1e-4 of the largest eigenvalue; smaller ones count as that, so that it stays finite where there is none.

    A batch of at most `components` + 1 rows has no more than `components` directions: it is returned unchanged.

    Args:
        features: [B, D] float.
        components: Components kept.

    Returns:
        [B, D] float32. All NaN where a feature is not finite.
    """
    features = features.float()
    if pcm_is_identity(len(features), features.shape[1], components):
        return features
    mean = features.mean(dim=0)
    with _no_autocast(features):
        rebuilt: Tensor = _TopComponents.apply(features - mean, components)  # type: ignore[no-untyped-call]
    return rebuilt + mean


def pcm_is_identity(rows: int, width: int, components: int = COMPONENTS) -> bool:
    """Whether primary component matching does nothing: centred rows span at most rows - 1 directions."""
    return rows <= components + 1 or width <= components


class _TopComponents(torch.autograd.Function):
    """X [B, D] to X V V^T, V [D, k] being the first k right singular vectors of X.

    With C = X^T X, eigenvalues l_i and G the gradient of the projector V V^T, first-order perturbation theory gives the
    gradient of C as the sum over kept i and dropped j of v_i^T G v_j / (l_i - l_j) in the plane of v_i and v_j.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, components: int) -> Tensor:
        values, vectors = _right_singular(x)  # [R], [R, D] with R = min(B, D)
        ctx.save_for_backward(x, values, vectors)
        ctx.components = components
        kept = vectors[:components]
        return (x @ kept.T) @ kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        x, values, vectors = ctx.saved_tensors
        kept, dropped = vectors[: ctx.components], vectors[ctx.components :]
        squares = values.square()
        floor = (_SMALLEST_GAP * squares[0]).clamp_min(torch.finfo(squares.dtype).tiny)
        gaps = (squares[: ctx.components, None] - squares[None, ctx.components :]).clamp_min(floor)
        to_null = squares[: ctx.components, None].clamp_min(floor)
        # v_i^T (X^T dY + dY^T X) for every kept i, [k, D]: the projector's gradient, made symmetric.
        pull = (kept @ x.T) @ gradient + (kept @ gradient.T) @ x
        within = (pull @ dropped.T) / gaps  # [k, R - k]
        # Directions in which the batch does not vary at all: what is left of `pull` outside the span of `vectors`.
        outside = (pull - (pull @ vectors.T) @ vectors) / to_null  # [k, D]
        turn = within @ dropped + outside  # [k, D]
        change = (x @ kept.T) @ turn + (x @ turn.T) @ kept
        return (gradient @ kept.T) @ kept + change, None


def _right_singular(x: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [R] and right singular vectors [R, D] of [B, D] float32, R = min(B, D); NaN for a bad batch.

    LAPACK and cuSOLVER may fail to converge on repeated singular values (a batch of equal rows, for one), with an error
    or without. The second try, as the eigenvectors of X^T X in float64 on the CPU, does converge.
    """
    rank = min(x.shape)
    if not bool(torch.isfinite(x).all()):
        return x.new_full((rank,), torch.nan), x.new_full((rank, x.shape[1]), torch.nan)
    try:
        _, values, vectors = torch.linalg.svd(x, full_matrices=False)
        if bool(torch.isfinite(vectors).all()):
            return values, vectors
    except RuntimeError:  # LinAlgError is one; cuSOLVER's own errors are plain ones
        logger.debug("the singular value decomposition did not converge; trying another way")
    exact = x.detach().cpu().double()
    squares, eigenvectors = torch.linalg.eigh(exact.T @ exact)  # ascending
    values = squares.clamp_min(0).sqrt()
    return values.flip(0)[:rank].to(x), eigenvectors.T.flip(0)[:rank].to(x)


def _no_autocast(like: Tensor) -> torch.autocast:
    """Keeps products in float32 where the caller's code runs under autocast."""
    return torch.autocast(like.device.type, enabled=False)
