"""The commands of `longclip-rt`, one a file."""
