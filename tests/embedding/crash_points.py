"""Runs an embedding over and over in forked processes, and kills each at another operation on the disk.

Run by test_pipeline.py: `python crash_points.py FOLDER OUTPUT [--overwrite]`. Every operation that changes a name or
waits for the disk is a point at which a kill could leave something half done; all of them are tried, one a process.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

# Imported before forking, for the sake of speed.
import pyarrow.parquet  # noqa: F401
from fake_embedder import FakeEmbedder
from PIL import Image

from longclip_rt.embedding.pipeline import EmbedOptions, embed_files

OPERATIONS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


def embed(output: str, overwrite: bool, kill_at: int | None) -> None:
    count = 0

    def killing(operation):
        def wrapped(*arguments, **options):
            nonlocal count
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return operation(*arguments, **options)

        return wrapped

    # A killed process loses nothing that it wrote, synced or not, so waiting for the disk would only cost time.
    os.fsync = lambda handle: None
    for name in OPERATIONS:
        setattr(os, name, killing(getattr(os, name)))
    embed_files(["files.txt"], output, FakeEmbedder(), EmbedOptions(shard_size=15, workers=2, overwrite=overwrite))


def run(output: str, overwrite: bool, kill_at: int | None) -> bool:
    """Embeds in a forked process; says whether it was killed."""
    process = os.fork()
    if process == 0:
        try:
            embed(output, overwrite, kill_at)
        except BaseException as error:
            print(f"killed at {kill_at}: {error!r}", file=sys.stderr)
            os._exit(3)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status) != 0:
        sys.exit(1)
    return False


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path.cwd().iterdir() if path.is_file()}


def main(folder: str, output: str, overwrite: bool) -> None:
    os.chdir(folder)
    Image.init()
    # An output of other inputs, with a reject, that the one under test replaces.
    before = contents()
    if overwrite:
        shutil.copyfile("other.txt", "files.txt")
        run(output, True, None)
        old = contents()
        Path("files.txt").write_bytes(before["files.txt"])
    run(output, overwrite, None)
    expected = contents()
    stages = set()
    kill_at = 0
    while True:
        for name in set(contents()) - set(before):
            Path(name).unlink()
        if overwrite:
            for name, content in old.items():
                if name != "files.txt":
                    Path(name).write_bytes(content)
        killed = run(output, overwrite, kill_at)
        parts = Path(output + ".parts")
        stages |= {path.name for path in parts.iterdir()} if parts.exists() else {"gone"}
        if killed:
            # Sometimes twice, so that a resumed run is killed as well.
            if kill_at % 3 == 0:
                run(output, overwrite, kill_at % 7 + 3)
            run(output, overwrite, None)
        if contents() != expected or parts.exists():
            sys.exit(f"killed at {kill_at}: the output differs from that of an unbroken run, or work was left behind")
        if not killed:
            print(kill_at, *sorted(stages))
            return
        kill_at += 1


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--overwrite" in sys.argv)
