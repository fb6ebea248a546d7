from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from embed_case import Stop, embed, make_inputs
from fake_embedder import FakeEmbedder
from PIL import Image

from longclip_rt.embedding.workspace import Workspace
from longclip_rt.errors import BackendError, InputError, MissingExtraError, OutputError, ResumeError
from longclip_rt.formats.outputs import OutputFiles, load_embeddings


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_inputs()
    return tmp_path


@pytest.mark.parametrize("arguments", [["out.parquet"], ["out.npy", "--overwrite"]])
def test_killed_at_any_operation_it_goes_on_to_the_same_bytes(inputs, arguments):
    script = Path(__file__).with_name("crash_points.py")
    result = subprocess.run([sys.executable, script, inputs, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    points, *stages = result.stdout.split()
    # The kills reached the shards, the assembly, the publication and the clearing up.
    assert int(points) > 30
    assert {"lock", "state.json", "000001.json", "assembling", "ready", "gone"} <= set(stages)


class StopAfterShard(Stop):
    """Stops at the first sign of progress after a shard of `out.parquet` was committed."""

    def __init__(self, number: int, folder: Path = Path()) -> None:
        super().__init__(10**9, KeyboardInterrupt())
        self.record = folder / f"out.parquet.parts/{number:06}.json"

    def advance(self, entries):
        if self.record.exists():
            raise KeyboardInterrupt


def interrupted(shard=0, **options) -> int:
    """Stops a run soon after a shard was committed; returns how many were."""
    with pytest.raises(KeyboardInterrupt):
        embed(progress=StopAfterShard(shard), **options)
    return len(list(Path("out.parquet.parts").glob("0*.json")))


def test_a_stopped_run_goes_on_after_its_last_whole_shard():
    embed("unbroken.parquet")
    whole = interrupted()
    embedder = FakeEmbedder()
    progress = Stop(1000, KeyboardInterrupt())
    report = embed(embedder=embedder, progress=progress)
    assert report.embedded == 30 - 9 * whole
    assert progress.begun == (30, 30 - report.embedded)
    assert "0.png" not in embedder.transform.decoded
    assert Path("out.parquet").read_bytes() == Path("unbroken.parquet").read_bytes()
    assert Path("out.parquet.rejects.jsonl").read_bytes() == Path("unbroken.parquet.rejects.jsonl").read_bytes()


def test_a_damaged_shard_is_made_again():
    embed("unbroken.parquet")
    whole = interrupted()
    shard = Path("out.parquet.parts/000000.parquet")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert embed().embedded == 30 - 9 * (whole - 1)
    assert Path("out.parquet").read_bytes() == Path("unbroken.parquet").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype was float32 and now is float16"),
        ({"truncate": False}, "truncate was true and now is false"),
        ({"batch_size": 2}, "batch_size was 4 and now is 2"),
        ({"shard_size": 10}, "shard_size was 9 and now is 10"),
        ({"embedder": FakeEmbedder(precision="bf16")}, "precision was fp32 and now is bf16"),
        ({"embedder": FakeEmbedder(pca="x")}, "pca was not set and now is x"),
        ({"sources": ["other.txt"]}, r"the inputs have changed \(30 entries then, 3 now\)"),
    ],
)
def test_other_options_refuse_to_go_on_and_say_which(change, message):
    interrupted()
    with pytest.raises(ResumeError, match=message + ".*--restart"):
        embed(**change)
    # The refusal leaves the work as it was.
    assert embed().embedded < 30


def test_a_changed_list_refuses_to_go_on():
    interrupted()
    Path("files.txt").write_text(Path("files.txt").read_text().replace("data/4.png", "data/5.png"))
    with pytest.raises(ResumeError, match=r"inputs have changed \(both times 30 entries\)"):
        embed()
    report = embed(restart=True)
    assert report.embedded == 30


def test_workers_and_paths_as_typed_are_no_reason_to_refuse(inputs):
    interrupted()
    assert embed(sources=[str(Path("./files.txt"))], workers=5).embedded < 30


def test_an_output_that_is_complete_is_left_alone():
    first = embed()
    before = Path("out.parquet").stat().st_mtime_ns
    embedder = FakeEmbedder()
    second = embed(embedder=embedder)
    assert embedder.shapes == []
    assert (second.totals, second.embedded, second.rejects) == (first.totals, 0, first.rejects)
    assert Path("out.parquet").stat().st_mtime_ns == before
    assert not Path("out.parquet.parts").exists()


def test_an_output_of_other_work_is_not_replaced_unasked():
    embed(sources=["other.txt"])
    before = Path("out.parquet").read_bytes()
    with pytest.raises(OutputError, match=r"exists already \(the inputs have changed \(3 .* --overwrite"):
        embed()
    assert Path("out.parquet").read_bytes() == before
    assert embed(overwrite=True).totals.rows == 28


@pytest.mark.parametrize("name", ["out.parquet", "out.npy", "out.meta.json", "out.ids.jsonl"])
def test_a_file_of_somebody_else_is_not_replaced_unasked(name):
    Path(name).write_text("precious")
    with pytest.raises(OutputError, match=f"'{name}' exists already .it is not an output"):
        embed("out.parquet" if name == "out.parquet" else "out.npy")
    assert Path(name).read_text() == "precious"


def test_overwriting_makes_everything_anew():
    embed()
    embedder = FakeEmbedder()
    assert embed(embedder=embedder, overwrite=True).embedded == 30


def test_two_outputs_of_one_stem_do_not_share_their_metadata():
    embed("out.npy")
    embed("out.parquet")
    with pytest.raises(OutputError, match=r"'out.meta.json' belongs to 'out.npy'"):
        embed("out.jsonl", overwrite=True)
    assert len(load_embeddings("out.npy").ids) == 28


def test_two_outputs_of_one_stem_made_at_once_do_not_share_their_metadata_either() -> None:
    class Meanwhile(Stop):
        def begin(self, total, done, columns):
            embed("out.npy")

    for _ in range(2):
        with pytest.raises(OutputError, match=r"'out.meta.json' belongs to 'out.npy'"):
            embed("out.jsonl", progress=Meanwhile(1000, KeyboardInterrupt()))
    assert len(load_embeddings("out.npy").ids) == 28


def test_rejects_of_an_older_output_vanish():
    embed()
    Path("files.txt").write_text("data/3.png\n")
    assert embed(overwrite=True).rejects is None
    assert not Path("out.parquet.rejects.jsonl").exists()


def test_an_input_that_changes_meanwhile_is_noticed():
    class Change(Stop):
        def begin(self, total, done, columns):
            Path("files.txt").write_text(Path("files.txt").read_text().replace("data/13.png", "data/12.png"))

    with pytest.raises(InputError, match="changed while it was being read"):
        embed(progress=Change(1000, KeyboardInterrupt()))
    with pytest.raises(ResumeError, match="inputs have changed"):
        embed()


def test_shards_of_an_input_that_changed_and_changed_back_do_not_count():
    original = Path("files.txt").read_text()

    class Change(StopAfterShard):
        def begin(self, total, done, columns):
            Path("files.txt").write_text(original.replace("data/0.png", "data/1.png"))

    with pytest.raises(KeyboardInterrupt):
        embed(progress=Change(0))
    Path("files.txt").write_text(original)
    embed()
    embed("unbroken.parquet")
    assert Path("out.parquet").read_bytes() == Path("unbroken.parquet").read_bytes()


def test_standard_input_goes_on_when_it_comes_again(monkeypatch):
    content = Path("files.txt").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    interrupted(sources=["-"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert embed(sources=["-"]).embedded < 30
    assert not Path("out.parquet.parts").exists()


def test_a_second_run_at_once_is_refused():
    with Workspace(OutputFiles.from_path(Path("out.parquet"))), pytest.raises(OutputError, match="Another run"):
        embed()
    assert embed().totals.rows == 28


@pytest.mark.parametrize("place", ["state.json", "000001.parquet", "000001.json", "out.parquet"])
def test_a_full_disk_is_a_sentence_and_the_work_goes_on_later(monkeypatch, place):
    """The file `place` cannot be written, as on a disk that is full; everything before it was."""
    embed("unbroken.parquet")
    opened = Path.open

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_on_full_disk(path, mode="r", *arguments, **options):
        if mode == "wb" and path.name.removesuffix(".tmp") == place and "out.parquet.parts" in path.parts:
            return Full(path, "w")
        return opened(path, mode, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(OutputError, match=r"'out.parquet' cannot be written: No space left on device. Make room"):
            embed()
    assert not Path("out.parquet").exists()
    assert not list(Path().glob("out.parquet.parts/*.tmp"))
    assert not Path("out.parquet.parts/assembling").exists()
    report = embed()
    assert (report.embedded < 30) == (place != "state.json")
    assert Path("out.parquet").read_bytes() == Path("unbroken.parquet").read_bytes()


RUN = """
import sys, types
sys.path.insert(0, sys.argv[1])
from fake_embedder import FakeEmbedder
from PIL import Image
runtime = types.ModuleType("longclip_rt.runtime")
runtime.Embedder = types.SimpleNamespace(from_bundle=lambda *a, **k: FakeEmbedder(delay=float(sys.argv[2])))
sys.modules["longclip_rt.runtime"] = runtime
from longclip_rt.cli import main
main(["embed", "files.txt", "-o", "out.parquet", "--shard-size", "2", "--workers", "1", "--allow-rejects"])
"""


def start(delay: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(delay)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while not Path(path).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_command_killed_again_and_again_ends_with_the_same_bytes():
    embed("unbroken.parquet", shard_size=2, workers=1)
    for shard in (1, 5, 11):
        process = start(0.03)
        wait_for(f"out.parquet.parts/{shard:06}.json", process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not Path("out.parquet").exists()
    process = start(0)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "out.parquet\n"), err
    assert "Going on" in err
    assert Path("out.parquet").read_bytes() == Path("unbroken.parquet").read_bytes()


def test_control_c_says_how_to_go_on():
    process = start(0.1)
    wait_for("out.parquet.parts/000001.json", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Give the same command again to go on" in err
    assert "Traceback" not in err
    assert Path("out.parquet.parts/state.json").exists()
    assert embed(shard_size=2).embedded < 30


def test_from_another_working_directory_relative_paths_lead_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longclip_rt.embedding.pipeline import EmbedOptions, embed_files

    for folder, colour in (("one", "red"), ("other", "blue")):
        (tmp_path / folder).mkdir()
        for number in range(60):
            Image.new("RGB", (40, 40), colour).save(file := tmp_path / folder / f"{number}.bmp")
            os.utime(file, (0, 0))  # as archives give: sizes and times are no help
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "files.txt").write_text("".join(f"{number}.bmp\n" for number in range(60)))
    given = [str(lists / "files.txt")], tmp_path / "out.parquet", FakeEmbedder(), EmbedOptions(shard_size=4)
    monkeypatch.chdir(tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        embed_files(*given, StopAfterShard(0, tmp_path))
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(ResumeError, match="relative paths lead to other files from this working directory"):
        embed_files(*given)
    monkeypatch.chdir(tmp_path / "one")
    assert embed_files(*given).totals.rows == 60
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(OutputError, match=r"exists already \(relative paths lead to other files"):
        embed_files(*given)


def test_a_run_that_fails_before_its_first_shard_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEmbedder, "_vectors", lambda self, batch: np.full((len(batch), 8), np.nan, np.float32))
    with pytest.raises(BackendError):
        embed()
    assert not Path("out.parquet.parts").exists()


def test_a_run_that_was_killed_before_its_first_shard_binds_nobody() -> None:
    folder = Path("out.parquet.parts")
    folder.mkdir()
    (folder / "state.json").write_text('{"tool": "another"}')
    assert embed(dtype="float16").embedded == 30


def test_a_file_that_changed_since_its_shard_was_made_is_embedded_anew(caplog: pytest.LogCaptureFixture) -> None:
    interrupted()
    Image.new("RGB", (7, 7), "green").save("data/0.png")
    embedder = FakeEmbedder()
    assert embed(embedder=embedder).totals.rows == 28
    assert "0.png" in embedder.transform.decoded
    assert "shard 0 is made anew, for inputs in it have changed" in caplog.text
    embed("unbroken.parquet")
    assert Path("out.parquet").read_bytes() == Path("unbroken.parquet").read_bytes()


def test_a_file_that_was_absent_is_embedded_once_it_is_there() -> None:
    interrupted()
    Path("data/absent.txt").write_text("a red cup")
    assert embed().totals.rejects == 1


def test_a_complete_output_of_files_that_changed_is_no_longer_taken_for_done() -> None:
    embed()
    Image.new("RGB", (7, 7), "green").save("data/0.png")
    with pytest.raises(OutputError, match=r"exists already \(files that the inputs name have changed since\)"):
        embed()


def test_a_file_that_changes_during_the_run_is_noticed() -> None:
    class Change(Stop):
        def begin(self, total, done, columns):
            Path("data/13.txt").write_text("another text")

    with pytest.raises(InputError, match=r"Files changed while they were being embedded\. Run the command again"):
        embed(progress=Change(1000, KeyboardInterrupt()))
    embed()
    embed("unbroken.parquet")
    assert Path("out.parquet").read_bytes() == Path("unbroken.parquet").read_bytes()


def test_a_folder_that_was_moved_with_its_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin_in(folder: Path) -> None:
        folder.mkdir()
        monkeypatch.chdir(folder)
        make_inputs()

    begin_in(tmp_path / "here")
    whole = interrupted()
    monkeypatch.chdir(tmp_path)
    Path("here").rename("there")
    monkeypatch.chdir(tmp_path / "there")
    assert embed().embedded == 30 - 9 * whole
    monkeypatch.chdir(tmp_path)
    Path("there").rename("elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert embed().embedded == 0  # complete, wherever it lies


def test_a_complete_output_that_was_not_yet_moved_to_its_place_is_that_of_its_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "publish", _stopped)
        with pytest.raises(KeyboardInterrupt):
            embed()
    Image.new("RGB", (7, 7), "green").save("data/0.png")
    with pytest.raises(OutputError, match="files that the inputs name have changed since"):
        embed()
    assert len(load_embeddings("out.parquet").ids) == 28


def _stopped(workspace: Workspace) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("suffix", [".lance", ".faiss"])
def test_stores_resume_and_are_replaced_whole(suffix):
    class Stopping(Stop):
        def advance(self, entries):
            if Path(f"out{suffix}.parts/000001.json").exists():
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(f"out{suffix}", progress=Stopping(0, KeyboardInterrupt()))
    assert not Path(f"out{suffix}").exists()
    # The index is built at the end, so that another one may be chosen for begun work.
    report = embed(f"out{suffix}", index="ivf-pq")
    assert 0 < report.embedded < report.totals.entries
    embed("whole.parquet")
    whole, stored = load_embeddings("whole.parquet"), load_embeddings(f"out{suffix}")
    assert stored.ids == whole.ids and stored.kinds == whole.kinds
    np.testing.assert_array_equal(stored.vectors, whole.vectors)
    assert embed(f"out{suffix}", index="ivf-pq").embedded == 0
    with pytest.raises(OutputError, match="exists already"):
        embed(f"out{suffix}", dtype="float16", index="ivf-pq")
    embed(f"out{suffix}", dtype="float16", overwrite=True)
    assert load_embeddings(f"out{suffix}").vectors.dtype == np.float16
    assert not Path(f"out{suffix}.parts").exists()


def test_a_table_that_is_replaced_survives_a_stop_in_between():
    embed("out.lance")
    replace = Path.replace

    def stopped(self, target):
        if self.name == "out.lance" and self.parent.name == "ready":
            raise KeyboardInterrupt
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", stopped)
        embed("out.lance", dtype="float16", overwrite=True)
    assert not Path("out.lance").exists() and Path("out.lance.parts/replaced").is_dir()
    assert embed("out.lance", dtype="float16", overwrite=True).embedded == 0
    assert load_embeddings("out.lance").vectors.dtype == np.float16
    assert not Path("out.lance.parts").exists()


def test_indexes_belong_to_stores_and_folders_of_others_stay(monkeypatch):
    with pytest.raises(OutputError, match=r"takes no index 'hnsw'. Name one that ends with \.faiss\."):
        embed("out.lance", index="hnsw")
    with pytest.raises(OutputError, match=r"ends with \.lance or \.faiss"):
        embed("out.parquet", index="ivf-pq")
    with pytest.raises(OutputError, match=r"Choose one of flat, hnsw, ivf-pq"):
        embed("out.faiss", index="tree")
    Path("mine.lance").mkdir()
    Path("mine.lance/letter.txt").write_text("dear all")
    with pytest.raises(OutputError, match="is a folder"):
        embed("mine.lance", overwrite=True)
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(MissingExtraError, match=r"longclip-rt\[lance\]"):
        embed("out.lance")
    assert not Path("out.lance.parts").exists()
