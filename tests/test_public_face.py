from __future__ import annotations

import subprocess
import sys

import longclip_rt
from longclip_rt import errors


def test_the_face_gives_every_name_it_lists_and_no_other() -> None:
    for name in longclip_rt.__all__:
        assert getattr(longclip_rt, name) is not None
    assert not hasattr(longclip_rt, "runtime_that_is_not_there")
    declared = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert declared <= set(longclip_rt.__all__)


def test_importing_it_is_light() -> None:
    program = "import sys, longclip_rt; print(sorted({'numpy', 'torch', 'openvino', 'pyarrow'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
