from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pca_files import correlated, pairs, write_embeddings
from sklearn.decomposition import PCA

from longclip_rt.commands.pca import pca as command
from longclip_rt.errors import MissingExtraError, OutputError, PcaError
from longclip_rt.formats.outputs import FORMATS
from longclip_rt.pca import fit as pca_fit
from longclip_rt.pca.basis import load_pca
from longclip_rt.pca.fit import FitOptions, Moments, fit_pca
from longclip_rt.pca.plot import plot_fit


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_pieces_give_what_scikit_learn_gives_of_the_whole(chunk: int, offset: float) -> None:
    vectors = correlated(300, 24) + offset
    moments = Moments(24)
    for start in range(0, 300, chunk):
        moments.add(vectors[start : start + chunk])
    moments.add(vectors[:0])
    basis, theirs = moments.basis(), PCA(24, svd_solver="full").fit(vectors)
    np.testing.assert_allclose(basis.mean, theirs.mean_, atol=1e-10)
    np.testing.assert_allclose(basis.variances, theirs.explained_variance_, rtol=1e-6, atol=1e-12)
    signs = np.sign((basis.components * theirs.components_.T).sum(axis=0))
    # Directions of nearly equal variance turn with the last digits; the first six stand apart.
    np.testing.assert_allclose((basis.components * signs)[:, :6], theirs.components_.T[:, :6], atol=1e-8)
    assert all(column[np.abs(column).argmax()] > 0 for column in basis.components.T)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_pca_written_is_fitted_to_every_row_of_the_file(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pca_fit, "CHUNK_ROWS", 32)
    vectors, ids, kinds = pairs(100, 24)
    path = write_embeddings(tmp_path / f"e{suffix}", vectors, ids, kinds)
    report = fit_pca([path], FitOptions(k=5))
    assert report.pca is not None and report.pca.fit == "joint" and report.pca.weights == "w" * 64
    stored = vectors.astype(np.float32)
    theirs = PCA(5, svd_solver="full").fit(stored.astype(np.float64))
    ours = report.pca.apply(stored, "text", normalize=False)
    signs = np.sign((report.pca.bases["joint"].components * theirs.components_.T).sum(axis=0))
    np.testing.assert_allclose(ours * signs, theirs.transform(stored.astype(np.float64)), atol=1e-6)
    np.testing.assert_allclose(report.pca.bases["joint"].explained(), theirs.explained_variance_ratio_.sum(), rtol=1e-9)
    assert report.pca.bases["joint"].rows == 200


def test_apart_fits_each_kind_alone(tmp_path: Path) -> None:
    vectors, ids, kinds = pairs(100, 24)
    report = fit_pca([write_embeddings(tmp_path / "e.parquet", vectors, ids, kinds)], FitOptions(k=5, fit="apart"))
    assert report.pca is not None and report.pca.fit == "apart"
    for kind, first in (("image", 0), ("text", 1)):
        np.testing.assert_allclose(report.bases[kind].mean, vectors[first::2].mean(axis=0), atol=1e-7)
        assert report.bases[kind].rows == 100
    assert report.retention is not None and report.retention.reconstructed


def test_memory_does_not_grow_with_the_rows() -> None:
    def peak(chunks: int) -> int:
        moments = Moments(64)
        tracemalloc.start()
        for seed in range(chunks):
            moments.add(correlated(256, 64, seed))
        moments.basis()
        return tracemalloc.get_traced_memory()[1]

    try:
        peak(2)
        few, many = peak(4), peak(60)
    finally:
        tracemalloc.stop()
    assert many < 1.1 * few


def test_the_table_tells_where_retrieval_breaks(tmp_path: Path) -> None:
    """Six directions hold the pairs: with them R@1 is what it is without PCA, and with two it is not."""
    vectors, ids, kinds = pairs(400, 32)
    path = write_embeddings(tmp_path / "e.parquet", vectors, ids, kinds)
    table = {k: fit_pca([path], FitOptions(k=k)).retention for k in (2, 6)}
    for k, retention in table.items():
        assert retention is not None and retention.pairs == retention.texts == retention.images >= 60
        assert [row.k for row in retention.rows] == [k, 16, 32, None]
        full, whole = retention.rows[-1], retention.rows[-2]
        assert full.neighbours == 1.0 and whole.explained == pytest.approx(1)
        assert full.images_found is not None and full.texts_found is not None
        assert full.images_found > 0.9 and full.texts_found > 0.9
        first = retention.rows[0]
        assert first.images_found is not None and first.neighbours is not None
        if k == 6:
            assert first.images_found > 0.85 and first.explained > 0.9
        else:
            assert first.images_found < 0.7 and first.neighbours < 0.2


def test_held_out_rows_take_no_part_in_what_they_are_measured_with(tmp_path: Path) -> None:
    vectors, ids, kinds = pairs(100, 16)
    path = write_embeddings(tmp_path / "e.parquet", vectors, ids, kinds)
    report = fit_pca([path], FitOptions(held_out=40))
    assert report.retention is not None and report.pca is None
    held = report.retention.texts
    # Both members of a pair go the same way; the share of 200 rows is 40 of them, about.
    assert held == report.retention.images == report.retention.pairs and 8 <= held <= 40
    assert fit_pca([path], FitOptions(held_out=0)).retention is None


def test_pairs_by_row_and_none(tmp_path: Path) -> None:
    vectors, _, _ = pairs(200, 16)
    images = write_embeddings(tmp_path / "i.parquet", vectors[::2])
    texts = write_embeddings(tmp_path / "t.parquet", vectors[1::2], ["a text"] * 200, ["text"] * 200)
    by_row = fit_pca([images, texts], FitOptions(pairs="rows")).retention
    assert by_row is not None and by_row.pairs > 30 and (by_row.rows[-1].images_found or 0) > 0.9
    alone = fit_pca([images], FitOptions()).retention
    assert alone is not None and (alone.texts, alone.pairs) == (0, 0) and alone.rows[0].texts_found is None
    none = fit_pca([images, texts], FitOptions(pairs="none")).retention
    assert none is not None and none.pairs == 0 and none.rows[0].images_found is None
    assert none.rows[0].neighbours is not None


def test_several_texts_of_an_image_count_and_several_images_of_a_name_do_not(tmp_path: Path) -> None:
    vectors, _, _ = pairs(200, 16)
    ids = [name for row in range(100) for name in (f"{row}.jpg", f"{row}.a.txt", f"other/{row}.b.jpg", f"{row}.b.txt")]
    kinds = ["image", "text"] * 200
    twice = fit_pca([write_embeddings(tmp_path / "e.parquet", vectors, ids, kinds)], FitOptions()).retention
    assert twice is not None and twice.pairs == 0
    once = [id_.replace(".b.jpg", "-x.jpg") for id_ in ids]
    several = fit_pca([write_embeddings(tmp_path / "f.parquet", vectors, once, kinds)], FitOptions()).retention
    assert several is not None and several.pairs == several.texts > 20 and several.pairs % 2 == 0


def test_what_cannot_be_fitted_is_said(tmp_path: Path) -> None:
    vectors = correlated(10, 16)
    path = write_embeddings(tmp_path / "e.parquet", vectors)
    with pytest.raises(PcaError, match="10 rows of 16 numbers have at most 9 components; 10 were asked for"):
        fit_pca([path], FitOptions(k=10))
    with pytest.raises(PcaError, match="0 text rows of 16"):
        fit_pca([path], FitOptions(k=2, fit="apart"))
    reduced = write_embeddings(tmp_path / "r.parquet", vectors, pca="p" * 64)
    with pytest.raises(PcaError, match="vectors that a PCA has made already"):
        fit_pca([reduced], FitOptions(k=2))
    other = write_embeddings(tmp_path / "o.parquet", vectors, weights="v" * 64)
    with pytest.raises(PcaError, match="are of different models"):
        fit_pca([path, other], FitOptions(k=2))
    vectors[3, 3] = np.nan
    with pytest.raises(PcaError, match=r"nan\.parquet holds values that are not finite"):
        fit_pca([write_embeddings(tmp_path / "nan.parquet", vectors)], FitOptions(k=2))
    with pytest.raises(OutputError, match="cannot be read"):
        fit_pca([tmp_path / "absent.parquet"], FitOptions(k=2))
    with pytest.raises(PcaError, match="nothing to fit"):
        fit_pca([], FitOptions(k=2))
    for options in ({"k": 0}, {"fit": "both"}, {"pairs": "ids"}, {"held_out": -1}):
        with pytest.raises(PcaError):
            FitOptions(**options)  # type: ignore[arg-type]


def test_the_command_writes_prints_and_plots(tmp_path: Path) -> None:
    vectors, ids, kinds = pairs(200, 32)
    path = write_embeddings(tmp_path / "e.parquet", vectors, ids, kinds)
    out, plot = tmp_path / "pca.safetensors", tmp_path / "pca.svg"
    arguments = ["fit", str(path), "-k", "8", "-o", str(out), "--plot", str(plot)]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n" and load_pca(out).k == 8
    assert "Fitted to 400 rows of 32 numbers: 8 components explain 9" in result.stderr
    assert "R@1 text-image" in result.stderr and "no PCA" in result.stderr
    assert "<svg" in plot.read_text() and "K = 8" in plot.read_text(encoding="utf-8").replace("<!-- ", "")
    table = CliRunner().invoke(command, ["fit", str(path)])
    assert "same neighbour" in table.stdout and "Choose K and give it with -k" in table.stderr
    small = CliRunner().invoke(command, ["fit", str(path), "--held-out", "0"])
    assert "Variance explained by K components: 16: " in small.stdout and "Too few rows" in small.stdout
    for wrong in (["-o", "e.parquet"], ["--plot", "p.txt"], ["-k", "0"]):
        assert CliRunner().invoke(command, ["fit", str(path), *wrong]).exit_code == 2
    again = CliRunner().invoke(command, ["fit", str(path), "-k", "8", "-o", str(out)])
    assert isinstance(again.exception, OutputError) and "--overwrite" in str(again.exception)
    assert CliRunner().invoke(command, ["fit", str(path), "-k", "8", "-o", str(out), "--overwrite"]).exit_code == 0


def test_every_kind_of_picture_is_drawn_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids, kinds = pairs(50, 16)
    path = write_embeddings(tmp_path / "e.parquet", vectors, ids, kinds)
    report = fit_pca([path], FitOptions(k=4, fit="apart"))
    plot_fit(report, tmp_path / "p.png")
    plot_fit(report, tmp_path / "p.pdf")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "p.pdf").read_bytes()[:4] == b"%PDF"
    with pytest.raises(PcaError, match=r"should end with \.png, \.svg or \.pdf"):
        plot_fit(report, tmp_path / "p.gif")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"longclip-rt\[plot\]"):
        plot_fit(report, tmp_path / "q.png")
    result = CliRunner().invoke(command, ["fit", str(path), "-k", "4", "--plot", str(tmp_path / "q.png")])
    assert isinstance(result.exception, MissingExtraError) and not (tmp_path / "q.png").exists()


def test_fitting_needs_neither_scikit_learn_nor_torch(tmp_path: Path) -> None:
    vectors, ids, kinds = pairs(50, 16)
    path = write_embeddings(tmp_path / "e.parquet", vectors, ids, kinds)
    script = (
        "import sys\n"
        "for name in ('sklearn', 'scipy', 'matplotlib', 'torch', 'triton'): sys.modules[name] = None\n"
        "from longclip_rt.cli import main\n"
        f"main(['pca', 'fit', {str(path)!r}, '-k', '4', '-o', {str(tmp_path / 'p.safetensors')!r}])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert load_pca(tmp_path / "p.safetensors").k == 4
