"""Jobs on a cluster: what an actor does, here; and 500 pictures on two actors, of which one is killed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from longclip_rt.bundle.bundle import BUILT_IN
from longclip_rt.commands.embed import embed as command
from longclip_rt.embedding.pipeline import EmbedOptions, embed_files
from longclip_rt.errors import InputError, LongClipError, MissingExtraError, OutputError, ResumeError
from longclip_rt.formats.embeddings import load_embeddings
from longclip_rt.integrations.ray import embed, embed_job, units_from_files
from longclip_rt.integrations.ray_units import Unit, UnitWorker
from longclip_rt.runtime import Embedder

OPENING = {"backend": "openvino", "precision": "fp32"}


def photo(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(7):
        Path(f"photos/{number}.png").write_bytes(photo(number))
    Path("photos/3.png").write_bytes(b"no image")
    return tmp_path


def worked(units: list[Unit], output: str = "out", **options: Any) -> list[dict[str, Any]]:
    """Does units in this process, and returns the rows: counts or failures."""
    worker = UnitWorker(str(BUILT_IN), output, EmbedOptions(**options), {"fingerprint": "f" * 64}, OPENING)
    Path("out/rejects").mkdir(parents=True, exist_ok=True)
    batch = worker({"unit": [pickle.dumps(unit) for unit in units]})
    return [
        {"counts": json.loads(counts), "failure": failure}
        for counts, failure in zip(batch["counts"], batch["failure"], strict=True)
    ]


def stored(folder: str = "out") -> tuple[list[str], np.ndarray]:
    """Ids and vectors of all parts, in their order."""
    parts = [load_embeddings(path) for path in sorted(Path(folder).glob("part-*.parquet"))]
    return [id_ for part in parts for id_ in part.ids], np.concatenate([part.vectors for part in parts])


def alone(files: list[str], **options: Any) -> tuple[list[str], np.ndarray]:
    with Embedder.from_bundle(BUILT_IN, **OPENING) as embedder:  # type: ignore[arg-type]
        embed_files(files, "alone.parquet", embedder, EmbedOptions(overwrite=True, **options))
    found = load_embeddings("alone.parquet")
    return found.ids, found.vectors


def test_parts_hold_what_one_machine_embeds(here: Path) -> None:
    units = list(units_from_files(["photos"], EmbedOptions(shard_size=3)))
    assert [len(unit.entries) for unit in units] == [3, 3, 1]
    rows = worked(units, shard_size=3)
    assert [row["counts"]["longclip_rt.rows"] for row in rows] == ["3", "2", "1"]
    ids, vectors = alone(["photos"], shard_size=3)
    assert stored()[0] == ids
    np.testing.assert_array_equal(stored()[1], vectors)
    refused = pq.read_table("out/rejects").to_pylist()
    assert [(row["line"], row["id"]) for row in refused] == [(4, "photos/3.png")]
    assert "3.png' is not an image" in refused[0]["error"]


def test_a_part_that_is_there_is_not_made_again(here: Path) -> None:
    units = list(units_from_files(["photos"], EmbedOptions()))
    first = worked(units)
    before = Path("out/part-000000.parquet").stat()
    Path("photos/0.png").unlink()
    assert worked(units) == first and Path("out/part-000000.parquet").stat().st_mtime_ns == before.st_mtime_ns


def tar_of(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_shards_tables_and_uris(here: Path) -> None:
    Path("data").mkdir()
    samples = {f"{key}.{end}": content for key in "ab" for end, content in (("png", photo(ord(key))), ("txt", b"a"))}
    tar_of(Path("data/0.tar"), samples)
    images = [{"bytes": photo(1), "path": "x/1.png"}, {"bytes": b"no image", "path": None}]
    pq.write_table(pa.table({"image": images}), "data/1.parquet")
    pq.write_table(pa.table({"key": ["k0", "k1"], "image": [photo(2), photo(3)]}), "data/2.parquet")
    units = list(units_from_files([f"file://{here}/data", "photos/5.png"], EmbedOptions()))
    assert [Path(unit.source).name for unit in units] == ["0.tar", "1.parquet", "2.parquet", ""]
    assert all(not row["failure"] for row in worked(units, f"file://{here}/out"))
    ids, vectors = stored()
    assert ids == ["a.png", "b.png", "x/1.png", "k0", "k1", "photos/5.png"]
    with Embedder.from_bundle(BUILT_IN, **OPENING) as embedder:  # type: ignore[arg-type]
        seeds = [ord("a"), ord("b"), 1, 2, 3, 5]
        np.testing.assert_allclose(vectors, embedder.embed_images([photo(seed) for seed in seeds]), atol=1e-5)
    assert pq.read_table("out/rejects").column("id").to_pylist() == ["row 2"]


def test_texts_of_shards_and_tables(here: Path) -> None:
    tar_of(Path("texts.tar"), {"a.txt": b"a red circle", "a.png": photo(1), "b.txt": b"\xff"})
    pq.write_table(pa.table({"caption": ["a blue square", None], "id": ["i", "j"]}), "texts.parquet")
    rows = worked(list(units_from_files(["texts.tar", "texts.parquet"], EmbedOptions(texts=True))), texts=True)
    assert [row["counts"]["longclip_rt.rejects"] for row in rows] == ["1", "1"]
    ids, vectors = stored()
    assert ids == ["a.txt", "i"]
    with Embedder.from_bundle(BUILT_IN, **OPENING) as embedder:  # type: ignore[arg-type]
        np.testing.assert_allclose(vectors, embedder.embed_texts(["a red circle", "a blue square"]), atol=1e-5)


def test_what_fails_is_said_and_the_rest_is_made(here: Path) -> None:
    Path("bad.tar").write_bytes(b"no tar" * 200)
    Path("bad.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"wrong": ["a"]}), "other.parquet")
    rows = worked(list(units_from_files(["bad.tar", "bad.parquet", "other.parquet", "photos"], EmbedOptions())))
    assert "is a damaged tar file" in rows[0]["failure"] and "cannot be read as Parquet" in rows[1]["failure"]
    assert "has no column 'image' or 'path'" in rows[2]["failure"] and rows[3]["failure"] == ""
    absent = UnitWorker("absent", "out", EmbedOptions(), {}, OPENING)
    assert "absent" in absent({"unit": [pickle.dumps(Unit(0))]})["failure"][0]


def test_inputs_and_addresses_are_checked_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for files, message in (
        (["absent.tar"], "does not exist"),
        (["abc://bucket/x/"], "cannot be opened"),
        ([f"file://{here}/photos"], "holds no .parquet or .tar files"),
        (["-"], "read only once"),
    ):
        with pytest.raises(InputError, match=message):
            list(units_from_files(files, EmbedOptions()))
    for arguments, message in (
        (["--ray", "photos", "-o", "out"], "write --ray after FILE"),
        (["photos", "--ray"], "name a folder or a URI"),
        (["photos", "-o", "out.npy", "--ray"], "name a folder or a URI"),
        (["photos", "-o", "out"], "should end with"),
    ):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"longclip-rt\[ray\]"):
        embed_job(["photos"], "out", BUILT_IN)


def test_another_job_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longclip_rt.integrations.ray._connect", lambda ray, address: None)
    monkeypatch.setattr("longclip_rt.integrations.ray._run", lambda *a: iter([{"failure": "part: full."}]))
    with pytest.raises(OutputError, match=r"1 of 1 parts could not be made; .* same command .* error: part: full"):
        embed_job(["photos"], "out", BUILT_IN)
    with pytest.raises(ResumeError, match="dtype was float32 and now is float16"):
        embed_job(["photos"], "out", BUILT_IN, EmbedOptions(dtype="float16"))


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of this machine alone, with room for two actors."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        ray.init(
            num_cpus=4,
            logging_level=logging.ERROR,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 << 20,
        )
    yield ray
    ray.shutdown()


def actor_processes() -> list[int]:
    """Processes of this cluster that hold an actor with a model."""
    import ray

    session = os.fsencode(ray._private.worker.global_worker.node.get_session_dir_path())
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"MapWorker(MapBatches(UnitWorker))" in (folder / "cmdline").read_bytes():
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if session in Path(f"/proc/{parent}/cmdline").read_bytes():
                    found.append(int(folder.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the actor's process in /proc")
def test_500_pictures_on_two_actors_of_which_one_is_killed(here: Path, ray: Any) -> None:
    for number in range(7, 500):
        Path(f"photos/{number}.png").write_bytes(photo(number))
    options = EmbedOptions(shard_size=20)
    killed = []

    def kill() -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not killed:
            time.sleep(0.02)
            if len(list(Path("out").glob("part-*.parquet"))) >= 3 and (actors := actor_processes()):
                os.kill(actors[0], signal.SIGKILL)
                killed.append((len(actors), len(list(Path("out").glob("part-*.parquet")))))

    thread = threading.Thread(target=kill)
    thread.start()
    report = embed_job(["photos"], "out", BUILT_IN, options, actors=2, **OPENING)  # type: ignore[arg-type]
    thread.join()
    assert killed and killed[0][0] == 2 and killed[0][1] < 25
    assert (report.parts, report.skipped) == (25, 0)
    assert (report.totals.rows, report.totals.rejects) == (499, 1)
    ids, vectors = alone(["photos"], shard_size=20)
    assert stored()[0] == ids
    np.testing.assert_array_equal(stored()[1], vectors)

    Path("out/part-000007.parquet").unlink()
    again = CliRunner().invoke(
        command,
        f"photos -o out --shard-size 20 --bundle {BUILT_IN} --backend openvino --precision fp32 --allow-rejects "
        "--ray --ray-actors 2",
    )
    assert again.exit_code == 0, again.output
    assert "25 parts, 24 of them made before; 499 rows" in again.output
    np.testing.assert_array_equal(stored()[1], vectors)


def test_a_dataset_gets_vectors_and_errors_in_its_order(here: Path, ray: Any) -> None:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    for shard in range(3):
        numbers = range(4 * shard, 4 * shard + 4)
        tar_of(Path(f"{shard}.tar"), {f"{n:02}.png": photo(n) if n != 5 else b"no image" for n in numbers})
    dataset = ray.data.read_webdataset([str(here / f"{shard}.tar") for shard in range(3)], decoder=None)
    with pytest.raises(LongClipError, match="no column 'picture'; it has __key__, png"):
        embed(dataset, BUILT_IN, column="picture")
    found = embed(dataset, BUILT_IN, column="png", actors=2, batch_size=4, **OPENING).take_all()  # type: ignore[arg-type]
    assert [int(row["__key__"]) for row in found] == list(range(12))
    assert [row["__key__"] for row in found if row["error"]] == ["05"] and found[5]["embedding"] is None
    with Embedder.from_bundle(BUILT_IN, **OPENING) as embedder:  # type: ignore[arg-type]
        good = [row for row in found if not row["error"]]
        expected = embedder.embed_images([photo(int(row["__key__"])) for row in good])
    np.testing.assert_allclose(np.stack([row["embedding"] for row in good]), expected, atol=1e-5)


def test_the_figures_of_the_page_are_those_of_its_program() -> None:
    root = Path(__file__).parents[2]
    program = "import scale; print(scale.BEGIN + scale.tables() + scale.END, end='')"
    computed = subprocess.run(
        [sys.executable, "-c", program], cwd=root / "benchmarks", capture_output=True, text=True, check=True
    ).stdout
    assert computed in (root / "docs" / "scale.md").read_text(encoding="utf-8"), "run: python benchmarks/scale.py"
