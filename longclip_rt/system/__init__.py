"""The machine underneath: files, locks, signals, libraries that may be missing."""
