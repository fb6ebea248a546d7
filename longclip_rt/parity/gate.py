"""The parity gate: a backend against the torch towers, or what stands in for them, on real captions and photographs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import Backend, Float32
from longclip_rt.backends.batching import plan_batches
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.bundle.samples import example_photos, parity_texts
from longclip_rt.metrics import nearest_others
from longclip_rt.model.tokenizer import pad_tokens
from longclip_rt.parity.limits import LIMITS, LOOSEST, Check, Ids, Reference, Sample


def sample_for(bundle: Bundle) -> Sample:
    """The gate's texts and photographs, as a bundle's tokenizer and image size make them."""
    tokens = [entry.ids for entry in bundle.tokenizer.encode(parity_texts(bundle.tokenizer))]
    return Sample(tokens, np.stack([bundle.transform(photo) for photo in example_photos()]))


def reference_from_backend(backend: Backend, sample: Sample) -> Reference:
    """What another backend gives on the sample: a reference where torch and the weights are not at hand.

    The export held the fp32 graphs to the torch towers within 1e-4, far below what fp16 may differ by.

    Args:
        backend: One in fp32, on the bundle to be checked.
        sample: The inputs.
    """
    context = backend.bundle.architecture.context_length
    outputs: dict[str, dict[str, Float32]] = {}
    for tower, inputs in (("text", pad_tokens(sample.tokens, context)), ("image", sample.pixels)):
        names = backend.bundle.outputs(tower)
        batches = [backend.run(tower, inputs[start : start + 8], names) for start in range(0, len(inputs), 8)]
        joined = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
        outputs[tower] = dict(zip(names, joined, strict=True))
    return Reference(outputs)


def verify_backend(backend: Backend, sample: Sample, reference: Reference) -> Iterator[Check]:
    """Runs the whole gate on one backend in one precision.

    Args:
        backend: Opened on the files to be checked.
        sample: The inputs.
        reference: What the torch towers gave on them.

    Yields:
        One `Check` at a time, passed or not.
    """
    spans = reference.spans
    yield from _Gate(backend, "text", spans).text_checks(sample.tokens, reference.outputs["text"])
    yield from _Gate(backend, "image", spans).image_checks(sample.pixels, reference.outputs["image"])


class _Gate:
    def __init__(self, backend: Backend, tower: str, spans: dict[str, float]) -> None:
        self._backend = backend
        self._spans = spans
        self._tower = tower
        self._limits = LIMITS[backend.precision]
        self._architecture = backend.bundle.architecture
        self._context = self._architecture.context_length

    def _check(self, name: str, value: float, limit: float) -> Check:
        return Check(self._backend.name, self._backend.precision, self._tower, name, float(value), limit)

    def _embed(self, inputs: Any) -> Float32:
        return self._backend.run(self._tower, inputs)[0]

    def text_checks(self, tokens: Sequence[Ids], expected: dict[str, Float32]) -> Iterator[Check]:
        plan = plan_batches(
            [len(ids) for ids in tokens],
            pad_multiple=self._backend.pad_multiple,
            token_budget=8 * self._context,
            max_batch=32,
            max_length=self._context,
        )
        trimmed = np.zeros_like(expected["text_embeds"])
        for batch in plan:
            indices = list(batch.indices)
            trimmed[indices] = self._embed(pad_tokens([tokens[index] for index in indices], batch.length))
        yield from self._parity("text_embeds", trimmed, expected["text_embeds"])

        padded = pad_tokens(tokens, self._context)
        names = list(expected)
        full = self._in_batches(padded, names)
        for name in names[1:] if names[0] == "text_embeds" else names:
            yield from self._parity(name, full[name], expected[name])
        yield self._check("trimmed equals padded", _difference(trimmed, full["text_embeds"]), self._limits.invariance)

        some = pad_tokens(tokens[: min(12, len(tokens))], self._context)
        yield from self._batch_checks(some)
        noisy = some.copy()
        is_eot = some == self._architecture.eot_id
        after_eot = np.cumsum(is_eot, axis=1) - is_eot > 0
        noise = np.random.default_rng(0).integers(1, self._architecture.vocab_size, size=some.shape, dtype=np.int32)
        noisy[after_eot] = noise[after_eot]
        yield self._check("tokens after EOT changed", _difference(self._embed(some), self._embed(noisy)), 0.0)

    def image_checks(self, pixels: Float32, expected: dict[str, Float32]) -> Iterator[Check]:
        got = self._in_batches(pixels, list(expected))
        for name, values in got.items():
            yield from self._parity(name, values, expected[name])
        yield from self._batch_checks(pixels[: min(5, len(pixels))])

    def _in_batches(self, inputs: NDArray[Any], names: list[str]) -> dict[str, Float32]:
        parts = [self._backend.run(self._tower, inputs[start : start + 8], names) for start in range(0, len(inputs), 8)]
        return {name: np.concatenate([part[index] for part in parts]) for index, name in enumerate(names)}

    def _batch_checks(self, inputs: NDArray[Any]) -> Iterator[Check]:
        together = self._embed(inputs)
        order = np.random.default_rng(0).permutation(len(inputs))
        limit = self._limits.invariance
        yield self._check("shuffled batch", _difference(together[order], self._embed(inputs[order])), limit)
        alone = np.concatenate([self._embed(inputs[index : index + 1]) for index in range(len(inputs))])
        yield self._check("batch 1 equals batch N", _difference(together, alone), limit)

    def _parity(self, name: str, got: Float32, expected: Float32) -> Iterator[Check]:
        yield self._check(f"{name}: NaN or inf", float(np.count_nonzero(~np.isfinite(got))), 0.0)
        rows, wanted = got.reshape(-1, got.shape[-1]), expected.reshape(-1, expected.shape[-1])
        normalised = name.endswith(("_embeds", "_pca"))
        span = self._spans.get(name, 1.0)
        if self._limits.parity == "1 - cosine":
            limit = min(self._limits.bound / span**2, LOOSEST)
            error = 1.0 - _lowest_cosine(rows, wanted)
        else:
            # States other than the embeddings are not normalised; their difference is taken relative to their size.
            scale = 1.0 if normalised else max(1.0, float(np.abs(wanted).max()))
            limit = min(self._limits.bound / span, LOOSEST)
            error = _difference(rows, wanted) / scale
        yield self._check(f"{name}: {self._limits.parity}", error, limit)
        if normalised:
            yield self._check("other nearest neighbour", float(changed_neighbours(got, expected)), 0.0)


def _difference(a: Float32, b: Float32) -> float:
    return float(np.abs(a - b).max())


def _lowest_cosine(a: Float32, b: Float32) -> float:
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(((a64 * b64).sum(axis=1) / norms).min())


def changed_neighbours(got: Float32, expected: Float32) -> int:
    """Counts the vectors whose nearest other vector is not the same in both sets.

    Two neighbours whose similarities in `expected` differ by less than the error of a similarity in `got` can tell
    nothing about the export; a swap of such a pair is not counted.

    Args:
        got: Normalised vectors [N, D].
        expected: What they should be, [N, D].
    """
    if not np.isfinite(got).all():
        return len(got)
    true, rows = expected @ expected.T, np.arange(len(got))
    loss = true[rows, nearest_others(expected)] - true[rows, nearest_others(got)]
    # |g_i . g_j - e_i . e_j| <= |g_i - e_i| + |g_j - e_j| for vectors of length 1; two similarities are compared.
    errors = np.linalg.norm(got - expected, axis=1)
    return int(np.count_nonzero(loss > 2 * (errors + errors.max())))
