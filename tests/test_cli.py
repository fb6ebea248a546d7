from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click import Context
from click.testing import CliRunner

from longclip_rt import __version__
from longclip_rt.choices import BACKENDS
from longclip_rt.cli import COMMANDS, HIDDEN, longclip_rt, main
from longclip_rt.commands.info import info


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    command = longclip_rt.get_command(Context(longclip_rt), name)
    assert command is not None
    text = command.get_help(Context(command, info_name=name, **longclip_rt.context_settings))
    assert f"longclip-rt {name}" in text.partition("Examples:")[2]
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{name} {parameter.name}"  # type: ignore[attr-defined]


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from longclip_rt.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'openvino', 'onnxruntime', 'pyarrow', 'PIL', 'tokenizers', 'ftfy', 'onnx'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert all((name in result.stdout) == (name not in HIDDEN) for name in COMMANDS)


def test_embedding_imports_no_torch(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a cup\na cat\n")
    out = tmp_path / "out.parquet"
    arguments = ["embed", "--texts", str(tmp_path / "texts.txt"), "--bundle", str(tiny_bundle), "-o", str(out)]
    script = (
        "import sys\n"
        "from longclip_rt.cli import main\n"
        f"try: main({[*arguments, '--backend', 'openvino']!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'onnx', 'open_clip', 'longclip_rt.export'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert out.exists()


def test_the_module_runs_as_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "longclip_rt", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == f"longclip-rt, version {__version__}"


def test_an_error_is_one_sentence_and_exit_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["embed", str(tmp_path / "absent.txt"), "--bundle", str(tmp_path)])
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ") and "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "There is not enough memory. Free some"),
        (
            RuntimeError("Exception from node.cpp:823:\n[CPU] node 'x' can't alloc\n"),
            "memory ([CPU] node 'x' can't alloc)",
        ),
        (ImportError("libarrow.so: failed to map segment from shared object"), "memory (libarrow.so: failed to map"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "There is not enough memory ("),
        (OSError(errno.EMFILE, "Too many open files"), "Something of the system cannot be used: Too many open files."),
        (OSError(errno.EACCES, "Permission denied", "x"), "x cannot be used: Permission denied."),
    ],
)
def test_what_the_system_refuses_is_a_sentence(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: object) -> None:
        raise error

    monkeypatch.setattr(info, "callback", fail)
    with pytest.raises(SystemExit) as caught:
        main(["info"])
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and said in err and len(err.splitlines()) == 1


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(info, "callback", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["info"])


def test_a_usage_error_is_exit_status_2() -> None:
    for arguments in (["embed"], ["embed", "x.txt", "--precision", "int3"], ["no-such-command"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_info_tells_what_is_usable_and_how_to_mend_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    facts = json.loads(CliRunner().invoke(info, ["--json"]).stdout)
    states = {state["name"]: state for state in facts["backends"]}
    assert list(states) == list(BACKENDS)
    assert states["openvino"]["usable"] and "fp32" in states["openvino"]["precisions"]
    assert not states["onnxruntime"]["usable"]
    assert states["onnxruntime"]["remedy"] == 'pip install "longclip-rt[cpu]"'
    assert facts["versions"]["longclip-rt"] == __version__
    assert facts["machine"]["cores"] >= 1 and facts["bundles"] == []
    text = CliRunner().invoke(info).stdout
    assert (
        "onnxruntime not usable: the Python package onnxruntime is not installed. Mend it with: pip install"
        in " ".join(text.split())
    )
    assert "none yet; make one with: longclip-rt export" in text


def test_info_lists_bundles(tiny_bundle: Path, own_cache: Path) -> None:
    import shutil

    shutil.copytree(tiny_bundle, own_cache / "longclip-rt" / "bundles" / "mine")
    text = CliRunner().invoke(info).stdout
    assert str(own_cache / "longclip-rt" / "bundles" / "mine") in text
    assert "fp32 and fp16, from" in text
