"""Tests of the PCA head behind an engine; `test_device.py` runs them in a process of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from imitated_engines import (
    DRIVER,
    empty_log,
    expected,
    head_folder,
    ids,
    log,
    opened_head,
    runner,
    sums,
    text_engine,
)  # fmt: skip

from longclip_rt.errors import BackendError
from longclip_rt.tensorrt.head import KERNELS, load_head

__all__ = ["empty_log"]


def test_the_head_runs_after_the_engine_inside_the_graph(tmp_path: Path) -> None:
    head = opened_head(head_folder(tmp_path))
    opened = runner(text_engine(head=True), head=head)
    assert opened.outputs == ("text_embeds", "last_hidden_state", "text_pca")
    batch = ids(3, 5)
    states = (sums(batch) % 1000)[:, None] + np.arange(5)
    for turn in range(4):
        DRIVER.imitated_log_clear()
        reduced, embeds = opened.run(batch, ["text_pca", "text_embeds"])
        np.testing.assert_array_equal(reduced, (states + 100 * np.arange(1, 6)).astype(np.float32))
        np.testing.assert_array_equal(embeds, expected(batch))
        calls = log("kernel")
        assert len(calls) == (1, 2, 0, 0)[turn]
        if turn == 1:
            kinds = [line.split()[0] for line in calls]
            assert kinds == ["enqueue", "capture"]
            assert calls[1].split(" grid ")[1] == (
                "1 block 128 shared 22528 rows 3 width 16 dim 8 k 5 k_start 16 strides 16 32 eps 1e-05 floor 0.25 "
                "hidden 0 0"
            )
    freed = len(log("^free"))
    opened.close()
    assert len(log("^free")) > freed
    assert head.code_for(1).file == "few.cubin" and head.code_for(10_000).file == "many.cubin"


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    assert load_head(tmp_path, "text", 89) is None
    folder = head_folder(tmp_path)
    with pytest.raises(BackendError, match=r"compiled for sm_89, and this GPU is sm_90.*engine build"):
        load_head(folder, "text", 90)
    with pytest.raises(BackendError, match="does not hand out the states"):
        runner(text_engine(), head=opened_head(folder))
    with pytest.raises(BackendError, match=r"image\.head\.safetensors"):
        load_head(folder, "image", 89)
    about = json.loads((folder / KERNELS).read_text())
    about["codes"][0]["shared"] = 50_000
    (folder / KERNELS).write_text(json.dumps(about))
    with pytest.raises(BackendError, match="48 KiB"):
        load_head(folder, "text", 89)
    (folder / KERNELS).write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(BackendError, match="newer version"):
        load_head(folder, "text", 89)
    (folder / KERNELS).write_text("{")
    with pytest.raises(BackendError, match="cannot be read"):
        load_head(folder, "text", 89)
