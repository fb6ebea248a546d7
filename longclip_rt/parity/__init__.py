"""How near is near enough: the limits, the gate at export, the self-check at first use; for every backend."""
