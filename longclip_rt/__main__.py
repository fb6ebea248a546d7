"""`python -m longclip_rt` is `longclip-rt`."""

from longclip_rt.cli import main

main()
