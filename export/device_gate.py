"""The parity gate on the machine that serves: a backend against the bundle's own fp32 graphs on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longclip_rt.backends.base import Backend
from longclip_rt.bundle.bundle import Bundle, load_bundle
from longclip_rt.choices import LIBRARIES
from longclip_rt.errors import BackendError, MissingExtraError
from longclip_rt.opening import availability, open_backend
from longclip_rt.parity.gate import reference_from_backend, sample_for, verify_backend
from longclip_rt.parity.limits import Check
from longclip_rt.system.closing import closed_after
from longclip_rt.tensorrt.engines import engines_of


def device_checks(
    path: Path, backend: str = "auto", precision: str = "auto", devices: Sequence[int] | None = None
) -> list[Check]:
    """Runs the whole gate on a backend.

    Args:
        path: The bundle.
        backend: As for `open_backend`; but where `auto` meets engines of the precision, it opens one of them or fails.
        precision: Likewise.
        devices: Numbers of GPUs; each batch is run by one that is free.

    Raises:
        BackendError: The backend cannot be had, fails its self-check, or no CPU backend is there for the reference.
        BundleError: There is no bundle, or it is damaged.
    """
    bundle = load_bundle(path)
    with closed_after(_opened(bundle, backend, precision, devices)) as opened:
        sample = sample_for(bundle)
        reference_runtime = next((name for name in ("onnxruntime", "openvino") if availability(name).usable), None)
        if reference_runtime is None:
            raise BackendError("The gate needs OpenVINO or ONNX Runtime on the CPU. Install: pip install longclip-rt")
        with closed_after(open_backend(bundle, reference_runtime, "fp32")) as reference_backend:
            reference = reference_from_backend(reference_backend, sample)
        if bundle.pca is not None:
            reference = reference.with_pca(bundle.pca, bundle.manifest["pca"]["mode"])
        return list(verify_backend(opened, sample, reference))


def _opened(bundle: Bundle, backend: str, precision: str, devices: Sequence[int] | None) -> Backend:
    """Opens what is to be checked. That another backend is right says nothing of engines that cannot be opened."""
    engines, reasons = engines_of(bundle)
    engines = [each for each in engines if precision in ("auto", each.key.precision)]
    if backend != "auto" or not (engines or reasons):
        return open_backend(bundle, backend, precision, devices)
    for library in LIBRARIES:
        for wanted in sorted({each.key.precision for each in engines if each.key.library == library}):  # fp16 first
            try:
                return open_backend(bundle, library, wanted, devices)
            except (BackendError, MissingExtraError) as error:
                reasons.append(str(error))
    raise BackendError(
        f"The bundle {bundle.path} has engines, and none of them can be used here. "
        f"{' '.join(reason.rstrip('.') + '.' for reason in reasons)} Another backend is checked by its name: "
        "longclip-rt engine verify --backend NAME"
    )
