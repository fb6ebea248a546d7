from __future__ import annotations

import errno
import html
from pathlib import Path

import ftfy
import numpy as np
import pyarrow.parquet as pq
import pytest
from embed_case import Stop, embed, make_inputs, rejects
from fake_embedder import FakeEmbedder, FakeTransform
from PIL import Image

from longclip_rt.embedding import flow
from longclip_rt.embedding.inputs.entries import Entry
from longclip_rt.embedding.pipeline import EmbedOptions, plan_embedding, shards_from_entries
from longclip_rt.errors import BackendError, InputError, OutputError
from longclip_rt.formats.outputs import FORMATS, load_embeddings
from longclip_rt.model.preprocess import ImageTransform


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_inputs()
    return tmp_path


def test_rows_keep_the_order_of_the_inputs():
    report = embed()
    loaded = load_embeddings("out.parquet")
    lines = [line for line in Path("files.txt").read_text().splitlines() if line and line[0] != "#"]
    assert loaded.ids == [line for line in lines if "broken" not in line and "absent" not in line]
    assert loaded.kinds == ["text" if line.endswith(".txt") else "image" for line in loaded.ids]
    np.testing.assert_allclose(np.linalg.norm(loaded.vectors, axis=1), 1, atol=1e-6)
    totals = report.totals
    assert (totals.entries, totals.images, totals.texts, totals.rejects, report.embedded) == (30, 14, 14, 2, 30)
    assert (report.skipped.empty, report.skipped.comments) == (1, 1)
    assert [(row["line"], row["id"]) for row in rejects()] == [(10, "data/broken.jpg"), (21, "data/absent.txt")]
    assert rejects()[1]["error"] == "There is no such file."
    assert report.rejects == Path("out.parquet.rejects.jsonl")
    assert not Path("out.parquet.parts").exists()


def test_vectors_belong_to_their_rows():
    embed(batch_size=1)
    loaded = load_embeddings("out.parquet")
    embedder = FakeEmbedder()
    for row in (0, 12):
        crop = embedder.transform.crop(loaded.ids[row])
        np.testing.assert_array_equal(loaded.vectors[row], embedder.encode_crops(crop[np.newaxis])[0])


def test_tokens_and_truncation_are_told():
    report = embed()
    table = pq.read_table("out.parquet").to_pylist()
    for row in table:
        if row["kind"] == "text":
            assert row["tokens"] == len(Path(row["id"]).read_text().split()) + 2
            assert row["truncated"] == (row["tokens"] > 16)
        else:
            assert row["tokens"] is None
            assert row["truncated"] is None
    assert report.totals.truncated == sum(row["truncated"] or False for row in table) > 0


def test_a_text_that_is_too_long_can_be_a_reject():
    cut = embed("cut.parquet").totals.truncated
    report = embed(truncate=False)
    assert (report.totals.truncated, report.totals.rejects, report.totals.texts) == (0, cut + 2, 14 - cut)
    assert any("more than the model's 16" in row["error"] for row in rejects())


def test_metadata_tells_what_made_the_file():
    embed()
    metadata = load_embeddings("out.parquet").metadata
    expected = {
        "model": "fake",
        "dtype": "float32",
        "dim": "8",
        "base": ".",
        "rows": "28",
        "rejects": "2",
        "images": "14",
    }
    assert {key: metadata["longclip_rt." + key] for key in expected} == expected
    assert len(metadata["longclip_rt.fingerprint"]) == 64


@pytest.mark.parametrize("suffix", FORMATS)
def test_half_precision_rounds_the_vectors(suffix):
    embed("full.parquet")
    embed("half" + suffix, dtype="float16")
    full, half = load_embeddings("full.parquet"), load_embeddings("half" + suffix)
    assert half.vectors.dtype == np.float16
    np.testing.assert_array_equal(half.vectors, full.vectors.astype(np.float16))


def test_lines_that_are_texts():
    Path("texts.txt").write_text(f"a red cup\n\n#hash tag\nbad &#{'1' * 5000}; reference\nhttps://example.org\n")
    report = embed(sources=["texts.txt"], texts=True)
    assert load_embeddings("out.parquet").ids == ["a red cup", "#hash tag", "https://example.org"]
    assert [row["line"] for row in rejects()] == [4]
    assert rejects()[0]["error"].startswith("It holds a character reference that cannot be decoded: ")
    assert report.skipped.empty == 1


def test_sources_are_told_apart_in_rejects():
    embed(sources=["files.txt", "other.txt"])
    assert [(row["source"], row["line"]) for row in rejects()] == [
        ("files.txt", 10),
        ("files.txt", 21),
        ("other.txt", 3),
    ]


def test_only_rejects_still_make_an_output():
    Path("bad.txt").write_text("data/absent.txt\ndata/broken.jpg\nhttps://example.org/a.jpg\n")
    report = embed(sources=["bad.txt"])
    assert (report.totals.rows, report.totals.rejects) == (0, 3)
    assert load_embeddings("out.parquet").vectors.shape == (0, 8)


def test_text_batches_are_trimmed_and_alike():
    Path("texts.txt").write_text("".join(f"{'word ' * (index % 13)}end\n" for index in range(200)))
    embedder = FakeEmbedder()
    embed(embedder=embedder, sources=["texts.txt"], texts=True, shard_size=200)
    shapes = set(embedder.shapes)
    assert {length for _, length in shapes} == {4, 8, 12, 16}
    assert len(shapes) <= 8
    assert all(size <= 16 and size * length <= 4 * 16 for size, length in shapes)


def test_texts_are_repaired_by_any_number_of_workers(monkeypatch):
    monkeypatch.setattr(flow, "TEXTS_PER_TASK", 7)
    lines = [f"Caf\u00e9 {index} \u00c3\u00a9 &amp; \u201cso on\u201d {'word ' * (index % 20)}" for index in range(100)]
    plain = [" ".join(html.unescape(ftfy.fix_text(line)).split()).lower() for line in lines]
    assert plain[3] == 'caf\u00e9 3 \u00e9 & "so on" word word word'
    for name, texts, workers in (("one", lines, 1), ("many", lines, 5), ("plain", plain, 1)):
        Path(f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        assert embed(f"{name}.parquet", sources=[f"{name}.txt"], texts=True, workers=workers).totals.rows == 100
    vectors = [load_embeddings(f"{name}.parquet").vectors for name in ("one", "many", "plain")]
    np.testing.assert_array_equal(vectors[0], vectors[1])
    np.testing.assert_array_equal(vectors[0], vectors[2])


def test_the_number_of_workers_changes_nothing():
    embed("one.parquet", workers=1)
    embed("many.parquet", workers=7)
    assert Path("one.parquet").read_bytes() == Path("many.parquet").read_bytes()


def test_the_batch_size_does_change_the_fake_vectors():
    # Else the tests of resuming would prove nothing.
    embed("a.parquet", batch_size=4)
    embed("b.parquet", batch_size=3)
    assert np.any(load_embeddings("a.parquet").vectors != load_embeddings("b.parquet").vectors)


def test_a_fault_of_the_program_stops_the_run_and_leaves_the_work():
    Image.new("RGB", (6, 5)).save("data/crash.png")
    text = Path("files.txt").read_text()
    Path("files.txt").write_text(text + "data/crash.png\n")
    with pytest.raises(RuntimeError, match="a fault of the program"):
        embed()
    assert Path("out.parquet.parts/state.json").exists()
    assert not Path("out.parquet").exists()


def test_an_encoder_that_fails_or_gives_nan_stops_the_run():
    class Failing(FakeEmbedder):
        def encode_tokens(self, ids):
            raise InputError("not one bad input, but a whole batch")

    class Nan(FakeEmbedder):
        def encode_crops(self, crops):
            vectors = super().encode_crops(crops)
            vectors[-1, 3] = np.nan
            return vectors

    with pytest.raises(InputError, match="whole batch"):
        embed(embedder=Failing())
    with pytest.raises(BackendError, match=r"NaN or infinity for 'data/\d+.png'. Try --precision fp32"):
        embed(embedder=Nan(), restart=True)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("files.txt/out.parquet", "cannot be written: Not a directory"),
        ("absent/out.parquet", "Make the folder 'absent' first"),
        ("/proc/out.parquet", "'/proc/out.parquet' cannot be written"),
        ("folder.parquet", "is a folder"),
        ("out.csv", "ends with '.csv'"),
        ("/dev/full", "ends with ''"),
        ("table.parquet", "would overwrite the input"),
        ("list.npy", "would overwrite the input"),
        ("circle.parquet", "Too many levels of symbolic links"),
    ],
)
def test_outputs_that_cannot_be_are_refused(output, message):
    Path("folder.parquet").mkdir()
    Path("table.parquet").symlink_to("files.txt")
    Path("circle.parquet").symlink_to("circle.parquet")
    Path("files.txt").rename("list.ids.jsonl")
    Path("files.txt").write_text("data/3.png\n")
    sources = ["list.ids.jsonl"] if output == "list.npy" else ["files.txt"]
    with pytest.raises(OutputError, match=message):
        embed(output, sources=sources, texts=output == "list.npy")


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (["lists/captions.v2.txt"], "captions.v2.parquet"),
        (["lists"], "lists.parquet"),
        (["."], None),
        (["lists/table.parquet"], "table.embeddings.parquet"),
        (["lists/*"], "embeddings.parquet"),
        (["-"], "embeddings.parquet"),
        (["files.txt", "other.txt"], "embeddings.parquet"),
    ],
)
def test_the_output_is_named_after_the_list(inputs, sources, name):
    Path("lists").mkdir()
    Path("lists/captions.v2.txt").write_text("")
    Path("lists/table.parquet").write_text("")
    assert plan_embedding(sources, None, EmbedOptions())[1].main == Path(name or inputs.name + ".parquet")


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"batch_size": 0}, {"workers": 0}, {"shard_size": -1}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises((InputError, OutputError), match=r"unknown|at least 1"):
        EmbedOptions(**options)


def test_shards_are_bounded_by_the_size_of_their_ids(monkeypatch):
    monkeypatch.setattr("longclip_rt.embedding.pipeline.MAX_SHARD_BYTES", 100)
    entries = [Entry(line, "x" * size, "text", True) for line, size in enumerate([10, 10, 95, 10, 10, 10, 200, 1])]
    assert [[entry.line for entry in shard] for shard in shards_from_entries(entries, 3)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
        [7],
    ]


def test_progress_reaches_the_number_of_entries():
    class Count(Stop):
        def __init__(self):
            super().__init__(10**9, KeyboardInterrupt())

    progress = Count()
    embed(progress=progress)
    assert progress.begun == (30, 0)
    assert 10**9 - progress.after == 30


@pytest.mark.parametrize("opening", ["PIL.Image.open", "pathlib.Path.open"])
def test_that_files_cannot_be_opened_any_more_is_no_fault_of_the_input(
    opening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Decoding(FakeTransform):
        def crop(self, source):
            ImageTransform(4).crop(source)
            return super().crop(source)

    embedder = FakeEmbedder()
    embedder.transform = Decoding()
    open_file = Image.open if opening == "PIL.Image.open" else Path.open

    def fail(source, *arguments, **options):
        if Path(source).stem == "3":
            raise OSError(errno.EMFILE, "Too many open files")
        return open_file(source, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(opening, fail)
        with pytest.raises(OSError, match="Too many open files"):
            embed(embedder=embedder)
    embed(embedder=embedder)
    assert [line["id"] for line in rejects()] == ["data/broken.jpg", "data/absent.txt"]
