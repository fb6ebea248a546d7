from __future__ import annotations

import io
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from longclip_rt.errors import LongClipError, MissingExtraError, OutputError
from longclip_rt.train.run.report import RunLog, TrainProgress, plot_curves, read_metrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)


def rows(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()


@pytest.mark.usefixtures("no_tensorboard")
def test_figures_are_on_the_disk_at_once_and_come_back_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with RunLog(folder) as log:
        log.record(1, {"loss": torch.tensor(0.1, dtype=torch.float64), "lr": 1e-7 / 3})
        assert rows(folder) == ["step,name,value", "1,loss,0.1", f"1,lr,{1e-7 / 3!r}"]
        log.record(2, {"loss": math.nan, "val/long_i2t_r1": 1})
        assert read_metrics(folder)["lr"] == ([1], [1e-7 / 3])
    found = read_metrics(folder)
    assert list(found) == ["loss", "lr", "val/long_i2t_r1"]
    assert found["loss"][0] == [1, 2]
    assert math.isnan(found["loss"][1][1])
    log.close()


@pytest.mark.usefixtures("no_tensorboard")
def test_a_resumed_run_has_the_rows_of_one_without_a_stop(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with RunLog(whole) as log:
        for step in range(1, 7):
            log.record(step, {"loss": step / 7})
            if step % 2 == 0:
                log.record(step, {"r1": step / 10})
    log = RunLog(killed, resume_step=0)
    for step in range(1, 6):
        log.record(step, {"loss": step / 7 if step <= 4 else 99})
        if step % 2 == 0:
            log.record(step, {"r1": step / 10})
    log.close()
    with (killed / "metrics.csv").open("a") as file:
        file.write("5,r1,0.")  # cut short by the kill
    with RunLog(killed, resume_step=4) as log:
        log.record(4, {"r1": 0.4})  # validates again where it resumed
        for step in (5, 6):
            log.record(step, {"loss": step / 7})
        log.record(6, {"r1": 0.6})
    assert rows(killed) == rows(whole)
    with RunLog(killed, resume_step=-1):
        assert rows(killed) == ["step,name,value"]


@pytest.mark.usefixtures("no_tensorboard")
def test_damage_costs_its_row_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"step,name,value\n1,a,0.5\n\0\0\0\0\n2,a\n\xff,a,1\n3,a,2.5\n4,a,1")
    assert read_metrics(tmp_path) == {"a": ([1, 3], [0.5, 2.5])}
    with RunLog(tmp_path, resume_step=9) as log:
        log.record(10, {"a": 1})
    assert rows(tmp_path) == ["step,name,value", "1,a,0.5", "3,a,2.5", "10,a,1.0"]


@pytest.mark.usefixtures("no_tensorboard")
def test_mistakes_are_sentences(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(LongClipError, match="no figures"):
        read_metrics(run)
    with RunLog(run) as log:
        log.record(3, {"loss": 1})
        with pytest.raises(LongClipError, match="step 2 came after those of step 3"):
            log.record(2, {"loss": 1})
        with pytest.raises(LongClipError, match="cannot name a figure"):
            log.record(4, {"loss, long": 1})
    with pytest.raises(OutputError, match="earlier run"):
        RunLog(run)
    assert rows(run)[1:] == ["3,loss,1.0"]
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(LongClipError, match="does not begin with"):
        RunLog(tmp_path, resume_step=1)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n1,2\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        RunLog(tmp_path / "file" / "run")


@pytest.mark.usefixtures("no_tensorboard")
def test_a_missing_tensorboard_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "longclip_rt"), RunLog(tmp_path) as log:
        for step in range(3):
            log.record(step, {"loss": 1})
    assert [record.message for record in caplog.records if "longclip-rt[train]" in record.message] == caplog.messages
    assert len(caplog.messages) == 1
    assert len(rows(tmp_path)) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_tensorboard_shows_a_resumed_run_without_double_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.record(step, {"val/r1": step})
    # File names carry the second they were made in; the viewer reads them in order.
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000000.first"))
    with RunLog(tmp_path, resume_step=2) as log:
        log.record(3, {"val/r1": 30})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/r1")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.usefixtures("no_tensorboard")
@pytest.mark.parametrize("prefixes", [("", ""), ("train/", "val/")])
def test_curves_have_a_panel_for_what_was_recorded(tmp_path: Path, prefixes: tuple[str, str]) -> None:
    train, val = prefixes
    heights = []
    with RunLog(tmp_path) as log:
        log.record(0, {"grad_norm": 1})
        with pytest.raises(LongClipError, match=r"neither a loss.*It has grad_norm\."):
            plot_curves(tmp_path)
        for values in (
            {f"{train}loss": 4.0, f"{train}loss_long": math.nan},
            {f"{val}long_i2t_r1": 0.5, f"{val}long_t2i_r1": 0.4, f"{val}short_i2t_r1": 0.2},
            {f"{train}lr": 1e-6},
        ):
            log.record(1, values)
            path = plot_curves(tmp_path)
            with Image.open(path) as image:
                heights.append(image.height)
    assert path == tmp_path / "curves.png"
    assert heights[0] < heights[1] < heights[2]


@pytest.mark.usefixtures("no_tensorboard")
def test_curves_show_the_values_and_leave_pyplot_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import figure

    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    with RunLog(tmp_path) as log:
        for step in range(1, 301):
            log.record(step, {"loss": 5.0 + (-1) ** step, "val/loss": 3, "lr": step * 1e-6, "long_i2t_r1": step / 600})
    pyplot = sys.modules.get("matplotlib.pyplot")
    plot_curves(tmp_path)
    assert sys.modules.get("matplotlib.pyplot") is pyplot
    loss, recall, rate = drawn[0].axes
    assert [axis.get_ylabel() for axis in drawn[0].axes] == ["loss (nats)", "validation R@1 (%)", "learning rate"]
    assert rate.get_xlabel() == "optimiser steps"
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        "total (mean of 6 points)",
        "validation: total",
    ]
    _, mean, _ = loss.get_lines()
    assert list(mean.get_ydata()[3:-3]) == pytest.approx([5.0] * 294)  # the noise is gone, the level is not
    assert recall.get_lines()[0].get_ydata()[-1] == pytest.approx(50)


@pytest.mark.usefixtures("no_tensorboard")
def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with RunLog(tmp_path) as log:
        log.record(1, {"loss": 1})
    with pytest.raises(MissingExtraError, match=r"longclip-rt\[train\]"):
        plot_curves(tmp_path)


def test_a_log_gets_a_line_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    with TrainProgress(1000, 64, start=400, interval=30, stream=stream, clock=clock) as progress:
        clock.now += 500  # compiling
        progress.loss(9.0)
        progress.advance()
        for step in range(402, 532):
            clock.now += 0.5
            progress.loss(torch.tensor(step / 100))
            progress.advance()
        with progress.pause():
            clock.now += 65
        progress.advance()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 401 of 1,000, loss 9"
    assert lines[1] == "step 461 of 1,000, loss 4.61, 128 samples/s, 0:04:30 left"
    assert lines[2] == "step 521 of 1,000, loss 5.21, 128 samples/s, 0:04:00 left"
    # The validation slows the run, but not its training: the last 61 steps took 30 s.
    assert lines[3] == "step 532 of 1,000, loss 5.31, 130 samples/s, 0:07:44 left"
    assert len(lines) == 4


def test_the_last_step_of_a_log_is_shown_without_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with TrainProgress(3, 2, stream=stream, clock=clock) as progress:
        for _ in range(3):
            clock.now += 4
            progress.advance()
    assert stream.getvalue() == "step 3 of 3, 0.5 samples/s\n"


def test_steps_longer_than_the_window_have_a_speed() -> None:
    stream, clock = io.StringIO(), Clock()
    with TrainProgress(10, 2048, stream=stream, clock=clock) as progress:
        for _ in range(3):
            clock.now += 100
            progress.advance()
    assert stream.getvalue().splitlines()[-1] == "step 3 of 10, 20.5 samples/s, 0:11:40 left"


def test_a_terminal_gets_a_bar_and_warnings_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = Terminal(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with TrainProgress(10, 8, start=2, clock=clock) as progress:
        for _ in range(4):
            clock.now += 1
            progress.loss(1.25)
            progress.advance()
        logging.getLogger("longclip_rt").warning("a step was left out")
        progress.advance(4)
    shown = stream.getvalue()
    assert "loss 1.25, 8 samples/s, 0:00:04 left" in shown
    assert "100%" in shown
    assert "\ra step was left out\n" in shown  # on a line of its own
    assert logging.getLogger().handlers == [handler]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_shows_nothing(stream: io.StringIO) -> None:
    clock = Clock()
    with TrainProgress(10, 8, quiet=True, stream=stream, clock=clock) as progress:
        for _ in range(10):
            clock.now += 60
            progress.loss(1)
            progress.advance()
    assert stream.getvalue() == ""


def test_events_that_no_longer_fit_on_the_disk_are_a_sentence_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path) as log, pytest.raises(OutputError, match="cannot be written: File too large"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        try:
            for step in range(1000):
                log.record(step, {"loss": step})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.csv").stat().st_size < 4000  # so it was the events
    assert capfd.readouterr().err == ""  # no thread's traceback
