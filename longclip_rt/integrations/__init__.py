"""This package's models inside other libraries, one a file; each needs the extra of its name."""
