"""Which model is measured, and which ways."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from longclip_rt.bundle.bundle import Bundle, default_bundle, load_bundle
from longclip_rt.errors import BackendError
from longclip_rt.opening import AUTO_ORDER, availability, runs_on_gpu


@contextmanager
def model(path: Path | None, weights: str | None, fp16: bool, say: Callable[[str], None]) -> Iterator[Bundle]:
    """A bundle: the one at `path`, one made of weights for as long as the block runs, or the newest.

    Args:
        path: A bundle's directory, or None.
        weights: Anything `load_checkpoint` takes, or None.
        fp16: Whether to make half-precision graphs of the weights too.
        say: Told what is done next.

    Raises:
        BackendError: Both name a model.
    """
    if path is not None and weights is not None:
        raise BackendError("--bundle and --weights each name a model. Give one of them.")
    if weights is None:
        yield default_bundle() if path is None else load_bundle(path)
        return
    from longclip_rt.export.exporter import ExportOptions, export_bundle

    with tempfile.TemporaryDirectory(prefix="longclip-rt-bench-") as folder:
        options = ExportOptions(weights, Path(folder) / "bundle", fp16, verify=False)
        yield export_bundle(options, say)[0]


def ways_of(
    bundle: Bundle, backends: Sequence[str], precisions: Sequence[str], against: Sequence[str] | None
) -> tuple[dict[str, list[str]], bool]:
    """What takes part, in which precisions, and whether it is about GPUs.

    References are measured in fp32 and in every precision that a backend is measured in.

    Raises:
        BackendError: A backend cannot be used here.
    """
    ways: dict[str, list[str]] = {}
    for name in dict.fromkeys(each for named in backends for each in _chosen(named)):
        state = availability(name)
        if not state.usable:
            raise BackendError(f"The backend {name} cannot be used: {state.reason}. Mend it with: {state.remedy}")
        offered = [
            each for each in state.precisions if each != "fp16" or "fp16" in bundle.precisions or name == "torch"
        ]
        ways[name] = list(dict.fromkeys(offered[0] if each == "auto" else each for each in precisions))
    places = {name: runs_on_gpu(name) for name in ways}
    if len(set(places.values())) > 1:
        raise BackendError(f"Backends on a GPU and on the CPU are not measured together; got {', '.join(ways)}.")
    measured = {each for found in ways.values() for each in found}
    for name in against or ():
        ways[name] = ["fp32", *sorted(measured - {"fp32"})]
    return ways, any(places.values())


def _chosen(name: str) -> list[str]:
    """What `auto` and `all` stand for: the first usable backend; every one on the GPU, or without a GPU on the CPU."""
    if name not in ("auto", "all"):
        return [name]
    usable = [each for each in AUTO_ORDER if availability(each).usable]
    if name == "all":
        on_gpu = [each for each in usable if runs_on_gpu(each)]
        return on_gpu or usable
    return [next(each for each in usable if each != "torch" or runs_on_gpu(each))]
