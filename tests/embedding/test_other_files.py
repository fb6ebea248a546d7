"""Files that only look like those of before, and files of others beside the output."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from embed_case import Stop, embed, make_inputs
from fake_embedder import FakeEmbedder
from PIL import Image

from longclip_rt.embedding.pipeline import EmbedOptions, EmbedReport, embed_files
from longclip_rt.errors import OutputError, ResumeError

COUNT = 100


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_inputs()


class StopAfterTheFirstShards(Stop):
    def __init__(self) -> None:
        super().__init__(10**9, KeyboardInterrupt())

    def advance(self, entries: int) -> None:
        if Path("../out.parquet.parts/000001.json").exists():
            raise self.error


@pytest.mark.parametrize("where", ["all of it", "its last bytes"])
def test_of_files_with_an_archives_times_both_ends_are_compared(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than 64 files, only later ones differ; names, sizes and times are the same."""
    for folder, colour in (("one", "red"), ("other", "blue")):
        Path(folder).mkdir()
        for number in range(COUNT):
            image = Image.new("RGB", (60, 60), "red")  # 10,854 bytes
            if number >= 70:
                image.paste(
                    colour, (0, 0, 60, 60) if where == "all of it" else (0, 0, 60, 1)
                )  # the last row in the file
            image.save(file := f"{folder}/{number}.bmp")
            os.utime(file, (1_700_000_000, 1_700_000_000))
    Path("files.txt").write_text("".join(f"{number}.bmp\n" for number in range(COUNT)))

    def run(folder: str, progress: Stop | None = None) -> EmbedReport:
        monkeypatch.chdir(folder)
        options = EmbedOptions(shard_size=4, workers=1)
        return embed_files(["../files.txt"], "../out.parquet", FakeEmbedder(), options, progress)

    with pytest.raises(KeyboardInterrupt):
        run("one", StopAfterTheFirstShards())
    with pytest.raises(ResumeError, match="relative paths lead to other files from this working directory"):
        run("../other")
    assert run("../one").totals.rows == COUNT


def test_a_strangers_list_beside_the_output_is_not_replaced_unasked() -> None:
    rejects = Path("out.parquet.rejects.jsonl")
    rejects.write_text('{"precious": 1}\n')
    with pytest.raises(OutputError, match=r"rejects.jsonl' exists already .*--overwrite"):
        embed()

    class Meanwhile(Stop):
        def begin(self, total: int, done: int, columns: Mapping[str, str]) -> None:
            rejects.write_text("precious")

    rejects.unlink()
    with pytest.raises(OutputError, match=r"rejects.jsonl' exists already"):
        embed(progress=Meanwhile(1000, KeyboardInterrupt()))
    assert rejects.read_text() == "precious"
    assert embed(overwrite=True).rejects is not None and "precious" not in rejects.read_text()


def test_a_list_of_rejects_that_was_left_behind_is_replaced() -> None:
    embed()
    Path("out.parquet").unlink()
    assert embed().totals.rejects == 2
