"""`python -m longclip_rt` is `longclip-rt`."""

from longclip_rt.cli import main

if __name__ == "__main__":  # not in the processes that multiprocessing starts
    main()
