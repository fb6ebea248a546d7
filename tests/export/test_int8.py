from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from longclip_rt.bundle.bundle import BUILT_IN, Bundle, load_bundle, write_manifest
from longclip_rt.bundle.samples import example_captions, example_photos
from longclip_rt.cli import longclip_rt
from longclip_rt.errors import BackendError, BundleError
from longclip_rt.export import exporter, int8
from longclip_rt.export.exporter import ExportOptions, ParityError, export_bundle, stages
from longclip_rt.export.int8 import Int8Sample, write_int8
from longclip_rt.model.tokenizer import pad_tokens
from longclip_rt.opening import open_backend
from longclip_rt.parity.fidelity import Fidelity

nncf = pytest.importorskip("nncf", reason="NNCF is not installed")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The built-in model with int8, of two alphas, on a few texts of the user's own and few of the package's photos."""
    path = Path(shutil.copytree(BUILT_IN, tmp_path_factory.mktemp("int8") / "bundle"))
    fields = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
    texts = tuple(caption.short for caption in example_captions())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "LEAST", 8)
        patch.setattr(int8, "example_photos", lambda: example_photos()[:2])
        fields["int8"], checks = write_int8(Bundle(path, fields), Int8Sample("mine", (), texts), print, (0.6, 0.95))
    assert {check.name for check in checks} == {
        "mean 1 - cosine", "text_embeds: 1 - cosine", "image_embeds: 1 - cosine", "share of lost neighbours",
        "share of lost first answers",
    }  # fmt: skip
    write_manifest(path, {key: value for key, value in fields.items() if key not in ("files", "content", "format")})
    return load_bundle(path)


def test_the_bundle_says_how_it_was_quantised_and_what_it_lost(quantised: Bundle) -> None:
    report = json.loads((quantised.path / "bundle.json").read_text(encoding="utf-8"))["int8"]
    photos = "the photographs of the package and parts of them"
    assert report["calibrated_on"]["text"] == {"inputs": -(-len(example_photos()) // 2), "from": "mine"}
    assert report["calibrated_on"]["image"] == {"inputs": 5, "from": photos}
    for tower in ("text", "image"):
        assert set(report["tried"][tower]) == {"0.6", "0.95"}
        assert report["tried"][tower][str(report["alphas"][tower])] == max(report["tried"][tower].values())
        assert report["fidelity"][tower]["count"] >= 5 and 0.98 < report["fidelity"][tower]["mean"] < 1
        assert f"{tower}.int8.xml" in quantised.manifest["files"] and f"{tower}.int8.bin" in quantised.manifest["files"]


def test_int8_is_taken_where_it_is_asked_for_alone(quantised: Bundle) -> None:
    ids = pad_tokens([tokens.ids for tokens in quantised.tokenizer.encode(["a red cup", "two dogs on a beach"])], 16)
    pixels = np.stack([quantised.transform(photo) for photo in example_photos()[:2]])
    opened = {precision: open_backend(quantised, "auto", precision) for precision in ("fp32", "int8", "auto")}
    assert opened["auto"].precision != "int8" and opened["int8"].name == "openvino"
    for tower, inputs in (("text", ids), ("image", pixels)):
        exact, lossy = (opened[precision].run(tower, inputs)[0] for precision in ("fp32", "int8"))
        assert 0.95 < (exact * lossy).sum(axis=1).min() < 1 - 1e-6  # as fp32, and yet another arithmetic
    for backend in opened.values():
        backend.close()
    with pytest.raises(BackendError, match="was exported without --int8"):
        open_backend(load_bundle(BUILT_IN), "openvino", "int8")
    with pytest.raises(BackendError, match="onnxruntime does not compute in int8"):
        open_backend(quantised, "onnxruntime", "int8")


def test_int8_without_its_weights_is_no_bundle(quantised: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(quantised.path, tmp_path / "copy")
    (copy / "text.int8.bin").unlink()
    with pytest.raises(BundleError, match=r"lacks text\.int8\.bin"):
        load_bundle(copy)


def test_what_loses_too_much_is_not_written(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = Fidelity(8, 0.98, 0.9, 0.5, 0.4, 1.0, 0.0)

    def write(bundle: Bundle, *rest: object) -> tuple[dict[str, object], list[object]]:
        return {}, list(poor.checks("openvino", "int8", "text"))

    monkeypatch.setattr(exporter, "write_int8", write)
    monkeypatch.setattr(exporter, "export_tower", lambda tower, path: path.touch())
    monkeypatch.setattr(exporter, "structure_checks", lambda *arguments: [])
    options = ExportOptions(str(tiny_weights), tmp_path / "bundle", verify=False, int8=True)
    with pytest.raises(ParityError, match=r"3 of 4 checks.*leave --int8 out, or calibrate on more of your own inputs"):
        export_bundle(options)
    assert stages(options) == stages(dataclasses.replace(options, int8=False)) + 3  # two towers, and the gate of them
    assert not (tmp_path / "bundle").exists()


def test_the_command_refuses_a_sample_that_is_too_small_or_not_asked_for(tiny_weights: Path, tmp_path: Path) -> None:
    def output(*arguments: str) -> str:
        command = ["export", "--weights", str(tiny_weights), "--out", str(tmp_path / "out"), *arguments]
        result = CliRunner().invoke(longclip_rt, command)
        assert result.exit_code == 1 and not (tmp_path / "out").exists()
        return result.output + str(result.exception)

    assert "Add --int8" in output("--int8-sample", str(tmp_path))
    listing = tmp_path / "files.txt"
    listing.write_text(f"{example_photos()[0]}\nabsent.jpg\n", encoding="utf-8")
    told = output("--int8", "--int8-sample", str(listing))
    assert "holds 1 photographs and 0 texts" in told and "absent.jpg" in told
