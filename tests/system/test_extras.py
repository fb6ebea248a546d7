from __future__ import annotations

import sys

import pytest

from longclip_rt.errors import MissingExtraError
from longclip_rt.system.extras import require


def test_what_is_installed_is_imported() -> None:
    assert require("json", "export").loads("1") == 1


@pytest.mark.parametrize("name", ["torch", "open_clip"])
def test_what_is_absent_names_the_extra_that_brings_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"'{name}' is not installed.*pip install \"longclip-rt\[export\]\""):
        require(name, "export")


def test_a_package_that_lacks_one_of_its_own_names_both(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_installed.py").write_text("import a_package_nobody_has\n")  # type: ignore[operator]
    with pytest.raises(MissingExtraError, match=r"'a_package_nobody_has' is not installed .*needed by half_installed"):
        require("half_installed", "train")
