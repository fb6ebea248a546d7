from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from longclip_rt.backends.base import Float32
from longclip_rt.backends.openvino import OpenVinoBackend
from longclip_rt.cli import main
from longclip_rt.commands.engine import verify
from longclip_rt.parity import gate


@pytest.fixture(autouse=True)
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = gate.parity_texts
    monkeypatch.setattr(gate, "parity_texts", lambda tokenizer: texts(tokenizer)[::8])


def test_the_gate_runs_on_a_backend_without_torch_or_the_weights(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(
        verify, [str(tiny_bundle), "--backend", "openvino", "--precision", "fp32", "--json"], catch_exceptions=False
    )
    checks = json.loads(result.stdout)
    assert result.exit_code == 0 and all(check["passed"] for check in checks)
    names = " ".join(check["name"] for check in checks)
    for part in ("text_embeds: max difference", "trimmed equals padded", "batch 1 equals", "shuffled", "after EOT"):
        assert part in names
    assert {(check["tower"], check["runtime"]) for check in checks} == {("text", "openvino"), ("image", "openvino")}


def test_the_gates_modules_import_no_torch() -> None:
    import subprocess

    code = "import sys, longclip_rt.export.device_gate, longclip_rt.parity.self_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_failed_check_makes_the_status_one(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = OpenVinoBackend._run

    def wrong(self: OpenVinoBackend, tower: str, inputs: np.ndarray, outputs: list[str]) -> list[Float32]:
        return [array + 0.01 * (tower == "image") for array in inner(self, tower, inputs, outputs)]

    monkeypatch.setattr(OpenVinoBackend, "_run", wrong)
    with pytest.raises(SystemExit) as caught:
        main(["engine", "verify", str(tiny_bundle), "--backend", "openvino", "--precision", "fp32"])
    printed = capsys.readouterr()
    assert caught.value.code == 1
    assert "FAILED image_embeds: max difference" in printed.out and "passed text_embeds: max difference" in printed.out
    assert "checks failed. Build the engines again" in printed.err
    with pytest.raises(SystemExit) as caught:
        main(["engine", "verify", str(tiny_bundle), "--backend", "tensorrt"])
    assert caught.value.code == 1 and "tensorrt is not installed" in capsys.readouterr().err
