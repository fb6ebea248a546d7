from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT_IN = ("README.md", "bundle.json", "image.fp16.onnx", "text.onnx", "tokenizer.json")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel that is built from a copy, so that no leftovers of this folder get in or stay."""
    copy = tmp_path_factory.mktemp("source")
    tracked = [
        "longclip_rt",
        "export",
        "kernels",
        "train",
        "examples",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ]
    subprocess.run(["cp", "-a", *tracked, str(copy)], cwd=ROOT, check=True)
    built_in = copy / "longclip_rt" / "assets" / "tiny"
    built_in.mkdir(exist_ok=True)
    for name in BUILT_IN:
        (built_in / name).touch()  # whether or not this folder holds the model by now
    (built_in / ".unfinished").touch()
    out = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_export_kernels_and_train_are_inside_the_package_only(wheel: set[str]) -> None:
    assert {name.partition("/")[0] for name in wheel if "dist-info" not in name} == {"longclip_rt"}
    exported = {f"longclip_rt/export/{path.name}" for path in (ROOT / "export").glob("*.py")}
    assert exported and exported <= wheel
    for folder in ("kernels", "train"):
        assert {f"longclip_rt/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")} <= wheel


def test_every_module_and_the_gates_data_are_in_the_wheel(wheel: set[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "longclip_rt").rglob("*.py")}
    assert modules <= wheel
    photos = {f"longclip_rt/assets/examples/photos/{path.name}" for path in (ROOT / "examples/photos").iterdir()}
    assert photos and photos | {"longclip_rt/assets/examples/captions.json", "longclip_rt/py.typed"} <= wheel


def test_the_built_in_model_is_in_the_wheel(wheel: set[str]) -> None:
    assert {f"longclip_rt/assets/tiny/{name}" for name in BUILT_IN} <= wheel
    assert "longclip_rt/assets/tiny/.unfinished" not in wheel


@pytest.mark.parametrize("folder", ["export", "kernels", "train"])
def test_the_links_are_relative_and_the_folders_are_no_packages(folder: str) -> None:
    link = ROOT / "longclip_rt" / folder
    assert link.is_symlink() and link.readlink() == Path("..") / folder
    assert not (ROOT / folder / "__init__.py").exists()
