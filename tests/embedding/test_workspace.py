from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longclip_rt.embedding.workspace import Totals, Workspace
from longclip_rt.errors import OutputError, ResumeError
from longclip_rt.formats.outputs import OutputFiles, load_embeddings, table_from_rows
from longclip_rt.system.lock import lock_folder

DIM = 3
METADATA = {"fingerprint": "f", "format": ".parquet", "dim": str(DIM), "dtype": "float32"}


@pytest.fixture
def workspace(tmp_path):
    with Workspace(OutputFiles.from_path(tmp_path / "out.parquet")) as workspace:
        yield workspace


def commit(workspace: Workspace, number: int, rejects: int = 0) -> None:
    ids = [f"{number}.{row}" for row in range(2)]
    table = table_from_rows(
        ids,
        ["text", "image"],
        np.full((2, DIM), number, np.float32),
        np.array([5, 0], np.int32),
        np.array([True, False]),
    )
    lines = [{"line": row, "id": f"bad {number}", "error": "bad"} for row in range(rejects)]
    workspace.commit(number, f"digest {number}", table, Totals(2 + rejects, 1, 1, 1, rejects), lines)


def test_shards_become_an_output(workspace, tmp_path):
    workspace.begin({"a": "b"})
    assert workspace.begun() == {"a": "b"}
    for number in (1, 0):
        commit(workspace, number, rejects=number)
    assert {number: record.inputs for number, record in workspace.whole_shards().items()} == {
        0: "digest 0",
        1: "digest 1",
    }
    totals = workspace.assemble(2, DIM, "float32", METADATA)
    assert totals == Totals(entries=5, images=2, texts=2, truncated=2, rejects=1)
    assert not (tmp_path / "out.parquet").exists()
    workspace.publish()
    loaded = load_embeddings(tmp_path / "out.parquet")
    assert loaded.ids == ["0.0", "0.1", "1.0", "1.1"]
    assert Totals.from_metadata(loaded.metadata, "longclip_rt.") == totals
    assert (tmp_path / "out.parquet.rejects.jsonl").read_text() == '{"line": 0, "id": "bad 1", "error": "bad"}\n'


def test_the_folder_goes_with_the_work_and_stays_without_its_end(tmp_path):
    files = OutputFiles.from_path(tmp_path / "out.parquet")
    with Workspace(files) as workspace:
        pass
    assert list(tmp_path.iterdir()) == []
    with Workspace(files) as workspace:
        workspace.begin({})
    assert list(tmp_path.iterdir()) == []  # no shard yet
    with Workspace(files) as workspace:
        workspace.begin({})
        commit(workspace, 0)
        (workspace.folder / "input-0").write_text("a copy of standard input")
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet.parts"]
    assert not (workspace.folder / "input-0").exists()
    with Workspace(files) as workspace:
        workspace.assemble(1, DIM, "float32", METADATA)
        workspace.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_a_rejects_file_of_an_older_output_goes(workspace, tmp_path):
    stale = tmp_path / "out.parquet.rejects.jsonl"
    stale.write_text("old")
    workspace.begin({})
    commit(workspace, 0)
    workspace.assemble(1, DIM, "float32", METADATA)
    assert stale.read_text() == "old"
    workspace.publish()
    assert not stale.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "000000.json").unlink(),
        lambda folder: (folder / "000000.parquet").unlink(),
        lambda folder: (folder / "000000.json").write_text("{"),
        lambda folder: (folder / "000000.json").write_text("{}"),
        lambda folder: (folder / "000000.json").write_text("[]"),
        lambda folder: (folder / "000000.parquet").write_bytes(b"PAR1"),
        lambda folder: (folder / "000000.parquet").write_bytes((folder / "000001.parquet").read_bytes()),
    ],
)
def test_a_damaged_shard_does_not_count(workspace, damage):
    workspace.begin({})
    for number in range(2):
        commit(workspace, number)
    damage(workspace.folder)
    assert list(workspace.whole_shards()) == [1]
    with pytest.raises(OutputError, match=r"Shard 0 .* Run the same command again"):
        workspace.assemble(2, DIM, "float32", METADATA)
    assert not (workspace.folder / "assembling").exists()
    commit(workspace, 0)
    assert workspace.assemble(2, DIM, "float32", METADATA).rows == 4


def test_shards_without_a_state_do_not_count(workspace):
    commit(workspace, 0)
    assert workspace.begun() is None
    workspace.begin({"a": "b"})
    assert workspace.whole_shards() == {}


@pytest.mark.parametrize("content", ["{", "[]", '"a"'])
def test_a_damaged_state_is_a_sentence(workspace, content):
    (workspace.folder / "state.json").write_text(content)
    with pytest.raises(ResumeError, match="--restart"):
        workspace.begun()
    workspace.discard()
    assert workspace.begun() is None


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    files = OutputFiles.from_path(tmp_path / "out.parquet")
    (tmp_path / "out.parquet.parts").mkdir()
    (tmp_path / "out.parquet.parts" / "thesis.doc").write_text("ten years of work")
    with pytest.raises(OutputError, match=r"'thesis.doc' in it is not of this program"), Workspace(files):
        pass
    assert (tmp_path / "out.parquet.parts" / "thesis.doc").exists()


def test_a_file_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "out.parquet.parts").write_text("x")
    with pytest.raises(OutputError, match="in the way"), Workspace(OutputFiles.from_path(tmp_path / "out.parquet")):
        pass


def test_a_second_run_is_refused_and_told_which_is_the_first(tmp_path):
    files = OutputFiles.from_path(tmp_path / "out.parquet")
    code = "import sys; from longclip_rt.system.lock import lock_folder; from pathlib import Path; "
    code += "lock = lock_folder(Path(sys.argv[1]), ''); print('locked', flush=True); sys.stdin.read()"
    folder = tmp_path / "out.parquet.parts"
    first = subprocess.Popen([sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"locked\n"
    with pytest.raises(OutputError, match=rf"Another run \(process {first.pid}\) is writing"), Workspace(files):
        pass
    first.kill()
    first.communicate()
    # What the killed run left is no lock.
    assert (folder / "lock").read_text() == f"{first.pid}\n"
    with Workspace(files):
        pass


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    import fcntl

    flock = fcntl.flock
    removed = []

    def flock_after_removal(lock, operation):
        if not removed:
            removed.append(True)
            (tmp_path / "parts" / "lock").unlink()
            (tmp_path / "parts").rmdir()
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with lock_folder(tmp_path / "parts", ""):
        assert removed
        assert (tmp_path / "parts" / "lock").exists()
        with pytest.raises(OutputError, match="Another run"):
            lock_folder(tmp_path / "parts", "")


def test_without_locks_work_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    import fcntl

    def refuse(lock, operation):
        raise OSError(37, "No locks available")

    with monkeypatch.context() as context:
        context.setattr(fcntl, "flock", refuse)
        lock_folder(tmp_path, "").close()
    assert "No locks available" in caplog.text
    monkeypatch.setitem(sys.modules, "fcntl", None)
    lock_folder(tmp_path, "").close()
    assert "has no file locks" in caplog.text


def test_an_output_that_vanished_before_the_end_is_made_again(workspace, tmp_path):
    workspace.begin({})
    commit(workspace, 0)
    workspace.assemble(1, DIM, "float32", METADATA)
    assert workspace.is_ready()
    Path(workspace.folder / "ready" / "out.parquet").unlink()
    assert not workspace.is_ready()
    workspace.assemble(1, DIM, "float32", METADATA)
    workspace.publish()
    assert load_embeddings(tmp_path / "out.parquet").ids == ["0.0", "0.1"]
