"""How fast the backends are on this machine, beside what one would use instead and beside what the machine allows."""
