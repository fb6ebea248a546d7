from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pca_files import correlated

from longclip_rt.errors import OutputError, PcaError
from longclip_rt.metrics import unit_rows
from longclip_rt.pca.basis import Basis, Pca, load_pca, save_pca
from longclip_rt.pca.fit import Moments


def basis_of(vectors: np.ndarray, k: int) -> Basis:
    moments = Moments(vectors.shape[1])
    moments.add(vectors)
    return moments.basis().first(k)


def pca_of(k: int = 5, dim: int = 16, seed: int = 0, **fields: str) -> Pca:
    return Pca({"joint": basis_of(correlated(200, dim, seed), k)}, model="ViT-B-16", weights="w" * 64, **fields)


def test_projecting_is_centring_and_turning() -> None:
    pca, vectors = pca_of(), correlated(9, 16, seed=3)
    basis = pca.bases["joint"]
    expected = (vectors - basis.mean) @ basis.components
    got = pca.apply(vectors.astype(np.float32), "text", normalize=False)
    assert got.shape == (9, 5) and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)
    unit = pca.apply(vectors, "image")
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


def test_reconstruction_is_the_nearest_point_of_the_subspace() -> None:
    vectors = correlated(9, 16, seed=3)
    whole = pca_of(16).apply(vectors, "text", "reconstruct")
    np.testing.assert_allclose(whole, vectors, atol=1e-6)
    pca = pca_of(5)
    coarse = pca.apply(vectors, "text", "reconstruct", normalize=False).astype(np.float64)
    basis = pca.bases["joint"]
    # What is left out is at right angles to what was kept, and lies outside of it only.
    np.testing.assert_allclose((vectors - coarse) @ basis.components, 0, atol=1e-6)
    np.testing.assert_allclose(
        pca.apply(coarse, "text", normalize=False), pca.apply(vectors, "text", normalize=False), atol=1e-6
    )


def test_texts_and_images_fitted_apart_have_each_their_basis() -> None:
    images, texts = correlated(200, 16, 0), correlated(200, 16, 5)[:, ::-1]
    pca = Pca({"text": basis_of(texts, 4), "image": basis_of(images, 4)})
    assert (pca.fit, pca.k, pca.dim) == ("apart", 4, 16)
    for kind, vectors in (("text", texts), ("image", images)):
        alone = Pca({"joint": pca.bases[kind]}).apply(vectors, kind)
        np.testing.assert_array_equal(pca.apply(vectors, kind), alone)
    assert np.abs(pca.apply(texts, "text") - pca.apply(texts, "image")).max() > 0.1


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-12, 1.0, 1e200])
def test_rows_of_any_length_become_unit_or_stay_short_as_torch_does_it(value: float) -> None:
    rows = value * np.array([[3.0, -4.0]])
    expected = rows / max(5 * value, 1e-12)
    np.testing.assert_allclose(unit_rows(rows), expected, rtol=1e-12)


def test_a_file_gives_back_the_pca_and_equal_ones_equal_bytes(tmp_path: Path) -> None:
    pca = pca_of(facts={"tool": "x", "a": [1]})
    save_pca(pca, tmp_path / "one.safetensors")
    save_pca(pca, tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    again = load_pca(tmp_path / "one.safetensors")
    assert again.sha256 == pca.sha256 and (again.model, again.weights, again.facts) == (
        pca.model,
        pca.weights,
        pca.facts,
    )
    basis = again.bases["joint"]
    np.testing.assert_array_equal(basis.components, pca.bases["joint"].components)
    assert basis.rows == 200 and basis.explained() == pca.bases["joint"].explained()


def test_the_identity_is_that_of_the_numbers() -> None:
    pca = pca_of()
    assert pca.sha256 == Pca(pca.bases, "another name").sha256
    assert len({pca.sha256, pca_of(4).sha256, pca_of(seed=1).sha256}) == 3
    assert pca.describe("project") == {
        "pca": pca.sha256, "pca_k": "5", "pca_mode": "project", "pca_fit": "joint"
    }  # fmt: skip


def test_files_that_are_no_pca_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(PcaError, match=r"no file .*absent"):
        load_pca(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(PcaError, match="cannot be read as safetensors"):
        load_pca(tmp_path / "text.safetensors")
    save_file({"weight": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(PcaError, match="is no PCA of this program"):
        load_pca(tmp_path / "model.safetensors")
    about = {"format": 1, "rows": {"joint": 9}, "model": "", "weights": "", "facts": {}}
    save_file({"joint.mean": np.zeros(3)}, tmp_path / "part.safetensors", {"longclip_rt.pca": json.dumps(about)})
    with pytest.raises(PcaError, match=r"lacks 'joint\.components'"):
        load_pca(tmp_path / "part.safetensors")
    save_file({"x": np.zeros(3)}, tmp_path / "new.safetensors", {"longclip_rt.pca": json.dumps({"format": 2})})
    with pytest.raises(PcaError, match="has format 2; this version reads up to 1"):
        load_pca(tmp_path / "new.safetensors")
    with pytest.raises(OutputError, match="Make the folder"):
        save_pca(pca_of(), tmp_path / "no" / "pca.safetensors")


def test_damaged_and_impossible_bases_are_refused() -> None:
    good = pca_of().bases["joint"]
    with pytest.raises(PcaError, match="joint, or the bases text and image; got image"):
        Pca({"image": good})
    with pytest.raises(PcaError, match="not orthonormal"):
        Pca({"joint": Basis(good.mean, good.components * 1.01, good.variances, 9)})
    with pytest.raises(PcaError, match="not finite"):
        Pca({"joint": Basis(good.mean * np.nan, good.components, good.variances, 9)})
    with pytest.raises(PcaError, match=r"shapes \[D\], \[D, K\]"):
        Pca({"joint": Basis(good.mean[1:], good.components, good.variances, 9)})
    with pytest.raises(PcaError, match="of one shape"):
        Pca({"text": good, "image": good.first(2)})


def test_vectors_models_and_modes_that_do_not_fit_are_named() -> None:
    pca = pca_of()
    with pytest.raises(PcaError, match=r"takes vectors \[n, 16\]; got \[2, 15\]"):
        pca.apply(np.zeros((2, 15)), "text")
    with pytest.raises(PcaError, match="no PCA mode 'shrink'; there are project and reconstruct"):
        pca.apply(np.zeros((2, 16)), "text", "shrink")
    pca.check_model("ViT-B-16", 16, "w" * 64)
    pca.check_model("ViT-B-16", 16, "")
    with pytest.raises(PcaError, match=r"fitted to embeddings of ViT-B-16 .*the model here is ViT-L-14"):
        pca.check_model("ViT-L-14", 16, "v" * 64)
    with pytest.raises(PcaError, match=r"D = 16.*D = 512"):
        pca.check_model("ViT-B-16", 512, "w" * 64)
