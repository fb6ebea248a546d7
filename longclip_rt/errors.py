"""Errors that a caller may want to catch; the command line prints each as one sentence and exits with 1."""

from __future__ import annotations

_LONGEST = 2000


class LongClipError(Exception):
    """Base of every error this package raises on purpose.

    The message says what was given, what was expected and how to mend it. It may quote a file, so that characters which
    could steer a terminal are shown as escapes, and what is longer than a screen is cut.
    """

    def __str__(self) -> str:
        text = super().__str__()
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        return "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)


class WeightsError(LongClipError):
    """Weights that cannot be read, are not CLIP-shaped, or would have to run code to be read."""


class BundleError(LongClipError):
    """An exported bundle that is absent, incomplete, damaged or of a newer format."""


class ExportError(LongClipError):
    """An export that failed, or that the parity gate refused."""


class TrainingError(LongClipError):
    """A training run that cannot begin or go on: its options, its data, its processes or its gradients."""


class BackendError(LongClipError):
    """A backend or precision that was asked for and cannot be had on this machine."""


class EngineError(BackendError):
    """A TensorRT engine that cannot be built, is damaged, or is not for this machine."""


class InputError(LongClipError):
    """One input that cannot be embedded. Pipelines set it aside as a reject and go on."""


class OutputError(LongClipError):
    """An output that cannot be written or read: no space, no permission, wrong format."""


class ResumeError(LongClipError):
    """Work that was begun with other inputs, another bundle or other options, and so cannot be continued."""


class PcaError(LongClipError):
    """A PCA that cannot be fitted or read, that is another model's, or vectors of two PCAs that were to be compared."""


class KernelError(LongClipError):
    """A kernel that was given what it does not take, or that did not compile to what it should."""


class MissingExtraError(LongClipError):
    """An optional dependency that is needed and not installed; the message names the extra."""
