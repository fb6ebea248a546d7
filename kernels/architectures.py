"""The GPUs that kernels are compiled for; apart from the compiler, so that commands and exports may list them."""

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities times ten: Ampere (data centre, desktop), Ada, Hopper, Blackwell (data centre, desktop)."""
