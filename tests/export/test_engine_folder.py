from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from longclip_rt.errors import OutputError
from longclip_rt.export.tensorrt.folder import engine_in_the_making


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "bundle" / "engines" / "tensorrt-sm89-abc"


def make(target: Path, content: str = "new") -> None:
    with engine_in_the_making(target) as folder:
        (folder / "text.plan").write_text(content)


def only(target: Path, content: str = "new") -> bool:
    """Whether the engine is there, and nothing beside it."""
    beside = [entry for entry in target.parent.iterdir() if entry != target]
    return not target.is_symlink() and (target / "text.plan").read_text() == content and not beside


def test_an_engine_is_replaced_whole(target: Path) -> None:
    make(target, "old")
    assert only(target, "old")
    with pytest.raises(KeyboardInterrupt), engine_in_the_making(target) as folder:
        (folder / "text.plan").write_text("half")
        raise KeyboardInterrupt
    assert only(target, "old")
    make(target)
    assert only(target)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "a fault of the disk")])
def test_the_old_engine_comes_back_where_the_new_one_does_not_get_its_name(
    target: Path, monkeypatch: pytest.MonkeyPatch, error: object
) -> None:
    make(target, "old")
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path.name == "new":
            raise error  # type: ignore[misc]
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        make(target)
    assert only(target, "old")
    monkeypatch.undo()
    # A process that was killed there left the old one to the next build, which may fail.
    making = target.with_name(f".{target.name}.making")
    making.mkdir()
    target.rename(making / "old")
    with pytest.raises(ValueError), engine_in_the_making(target):
        raise ValueError
    assert only(target, "old")


def test_what_killed_builds_left_is_removed(target: Path) -> None:
    for left in (
        f".{target.name}.1",
        f".{target.name}.old",
        f".{target.name}.making/new",
        f".{target.name}.making/old",
    ):
        folder = target.parent / left
        folder.mkdir(parents=True)
        (folder / "text.plan").write_text("left")
    other = target.parent / f".{target.name}d.1"
    other.mkdir()
    make(target)
    other.rmdir()  # of another engine, which may be under way
    assert only(target)


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_removed_and_not_what_they_lead_to(target: Path, tmp_path: Path, exists: bool) -> None:
    elsewhere = tmp_path / "elsewhere"
    if exists:
        elsewhere.mkdir()
        (elsewhere / "text.plan").write_text("kept")
    target.parent.mkdir(parents=True)
    for link in (target, target.with_name(f".{target.name}.old")):
        link.symlink_to(elsewhere, target_is_directory=True)
    for _ in range(2):
        make(target)
        assert only(target)
    assert elsewhere.exists() == exists and (not exists or (elsewhere / "text.plan").read_text() == "kept")


def test_a_second_build_of_the_same_engine_ends_with_a_sentence(target: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from longclip_rt.export.tensorrt.folder import engine_in_the_making\n"
        "with engine_in_the_making(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'text.plan').write_text('first')\n"
        "    print('building', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    with pytest.raises(OutputError, match=rf"process {process.pid}\) is building the engine {target.name}\. Wait"):
        make(target)
    make(target.with_name("tensorrt-sm89-abcd"))  # another one may be built beside it
    process.kill()
    process.communicate()
    make(target)
    assert (target / "text.plan").read_text() == "new" and len(list(target.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Make room and build again: nothing of this engine is left"),
        (errno.EROFS, "copy .*bundle to a folder that you may write to, and build there"),
        (errno.EIO, "Copy .*bundle to another place"),
    ],
)
def test_the_disks_failures_have_advice_that_can_be_followed(target: Path, number: int, advice: str) -> None:
    for reason in (OSError(number, "No"), OutputError("As files.py says it. It goes on where it stopped.")):
        if isinstance(reason, OutputError):
            reason.__cause__ = OSError(number, "No")
        wanted = rf"tensorrt-sm89-abc' cannot be written: No\. .*{advice}"
        with pytest.raises(OutputError, match=wanted) as caught, engine_in_the_making(target):
            raise reason
        assert "goes on" not in str(caught.value)
        assert not list(target.parent.iterdir())
