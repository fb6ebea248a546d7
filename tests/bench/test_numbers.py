from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from longclip_rt.bench import measure
from longclip_rt.bench.compare import Change, changes, lines, load_results
from longclip_rt.bench.plot import check_plot, plot
from longclip_rt.bench.plot import lines as plotted
from longclip_rt.bench.report import csv_text, table
from longclip_rt.bench.summary import bound, ratios, summary
from longclip_rt.bench.worker import Round
from longclip_rt.cli import main
from longclip_rt.commands.bench import bench
from longclip_rt.errors import BackendError, OutputError

TINY = Path(__file__).parent.parent.parent / "longclip_rt" / "assets" / "tiny"


def rounds(*milliseconds: float, rate: float = 10.0) -> list[Round]:
    return [Round([each / 1e3] * 3, {"encoder": [each / 2e3]}, rate) for each in milliseconds]


def results(milliseconds: float = 2.0, reference: float = 8.0, cpu: str = "A", batch: int = 4) -> dict[str, Any]:
    ours = summary(rounds(milliseconds, 1.02 * milliseconds), batch)
    theirs = summary(rounds(reference, reference), batch)
    ours |= {
        "way": "torch",
        "precision": "fp32",
        "reference": False,
        "ratios": {"open_clip fp32": ratios(ours, theirs)},
    }
    ours |= {"bound": bound(10, 10, 1e4, 1e5), "reached": 0.5}
    theirs |= {"way": "open_clip", "precision": "fp32", "reference": True}
    case = {"tower": "text", "batch": batch, "tokens": 20, "label": f"{batch} texts of 20 tokens", "agreement": 1.0}
    return {
        "format": 1,
        "bundle": {"name": "tiny", "sha256": "0" * 64, "trained": True},
        "machine": {"cpu": cpu, "cores": 2, "gpus": [], "features": ["avx2"], "memory_gib": 1.0,
                    "gpu_clocks": "", "load": 0.1},
        "versions": {"python": "3.12"},
        "commit": "1" * 40,
        "rates": {"gemm fp32": 1e12, "copy": 1e10},
        "ways": {"torch fp32": {"details": "2.9", "not apart": "the head"}},
        "skipped": {"open_clip fp16": "there is none"},
        "cases": [{**case, "rows": [ours, theirs]}],
    }  # fmt: skip


def test_a_summary_tells_percentiles_spread_and_rate() -> None:
    found = summary([*rounds(10, 12), Round([0.02], {}, 40.0)], 4)
    assert found["calls"] == 7
    assert found["ms"]["p50"] == pytest.approx(12)
    assert found["ms"]["p99"] == pytest.approx(20, rel=0.03)
    assert found["spread"] == pytest.approx((20 - 10) / 2 / 12)
    assert found["per_second"] == 10
    assert found["stages_ms"] == {"encoder": pytest.approx(5.5)}


def test_ratios_are_taken_round_by_round() -> None:
    ours, theirs = summary(rounds(1, 2, 4, rate=30), 1), summary(rounds(3, 4, 20, rate=10), 1)
    assert ratios(ours, theirs) == pytest.approx({"latency": 3, "lowest": 2, "highest": 5, "throughput": 3})


def test_the_bound_is_the_slower_of_two() -> None:
    assert bound(100, 10, 1000, 1000) == {"ms": pytest.approx(100), "of": "products"}
    assert bound(10, 100, 1000, 1000) == {"ms": pytest.approx(100), "of": "memory"}


def test_a_change_counts_beyond_noise_and_bound() -> None:
    assert not Change("x", 1.0, 1.2, noise=0.3).real
    assert Change("x", 1.0, 1.2, noise=0.1).regressed(0.1)
    assert not Change("x", 1.0, 1.2, noise=0.1).regressed(0.25)
    assert not Change("x", 1.0, 0.5, noise=0.1).regressed(0.1)


def test_runs_of_one_machine_are_compared_by_time() -> None:
    (change,) = changes(results(2.0), results(3.0, reference=99.0))
    assert change.share == pytest.approx(0.5)
    assert next(lines([change], 0.1)).startswith("REGRESSION: torch fp32, 4 texts of 20 tokens, ms: ")
    assert next(lines([change], 0.6)).startswith("slower: ")
    assert list(lines(changes(results(2.0), results(2.0)), 0.1)) == ["1 of 1 figures did not change beyond the noise."]


def test_runs_of_two_machines_are_compared_by_ratio() -> None:
    (change,) = changes(results(2.0, 8.0), results(4.0, 16.0, cpu="B"))
    assert change.share == pytest.approx(0)
    assert change.what.endswith("time by that of open_clip fp32")
    one = results(cpu="B")
    one["cases"][0]["rows"][0]["ratios"] = {}
    with pytest.raises(BackendError, match="--against reference"):
        changes(results(), one)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    other = results()
    other["bundle"]["name"] = "ViT-B-16"
    with pytest.raises(BackendError, match="different models"):
        changes(other, results())
    with pytest.raises(BackendError, match="no case in common"):
        changes(results(batch=1), results(batch=2))
    for text in ("", "[]", '{"format": 2, "cases": []}'):
        (tmp_path / "old.json").write_text(text)
        with pytest.raises(BackendError, match="--json"):
            load_results(tmp_path / "old.json")


@pytest.mark.parametrize(("now", "status"), [(2.0, 0), (3.0, 1)])
def test_compare_exits_1_on_a_regression(
    now: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.json").write_text(json.dumps(results(2.0)))
    monkeypatch.setattr(measure, "run_bench", lambda bundle, options, say: results(now))
    given = ["--bundle", str(TINY), "--backend", "onnxruntime", "--compare", str(tmp_path / "old.json")]
    run = CliRunner().invoke(bench, given)
    assert run.exit_code == status, run.output
    assert ("REGRESSION" in run.output) == bool(status)


def test_the_table_begins_with_ratios() -> None:
    text = list(table(results()))
    case = text.index("4 texts of 20 tokens, vectors agree to a cosine of 1.00000")
    assert text[case + 1].strip().startswith("3.96 x as fast as open_clip fp32 (3.92 to 4.00)")
    assert "Not measured, open_clip fp16: there is none" in text
    assert "Not told apart, torch fp32: the head" in text
    busy = results()
    busy["machine"]["load"] = 1.5
    assert not any("WARNING" in line for line in text)
    assert any("WARNING: other programs" in line for line in table(busy))


def test_the_csv_says_where_it_ran() -> None:
    text = csv_text(results(), "longclip-rt bench").splitlines()
    assert [line for line in text if line.startswith("# bundle")] == [f"# bundle: tiny, {'0' * 64}"]
    head, ours, theirs = (line.split(",") for line in text if not line.startswith("#"))
    assert dict(zip(head, ours, strict=True))["x open_clip fp32"] == "3.96"
    assert dict(zip(head, theirs, strict=True))["p50 ms"] == "8.000"


def test_a_plot_is_drawn_of_lines_over_batch_and_length(tmp_path: Path) -> None:
    found = results()
    found["cases"] += results(5.0, batch=1)["cases"]
    drawn = plotted(found, "batch")
    assert [batch for batch, _ in drawn["torch fp32, text 20"]] == [1, 4]
    assert set(plotted(found, "tokens")) == {f"{way} fp32, batch {b}" for way in ("torch", "open_clip") for b in (1, 4)}
    plot(found, tmp_path / "bench.svg")
    assert (
        "tokens of a text" in (tmp_path / "bench.svg").read_text() or (tmp_path / "bench.svg").stat().st_size > 10_000
    )
    with pytest.raises(OutputError, match="should end with"):
        check_plot(tmp_path / "bench.txt")


def test_values_with_commas(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--batch", "0"], ["--backend", "cpu"], ["--tokens", "20;77"]):
        with pytest.raises(SystemExit) as end:
            main(["bench", *given])
        assert end.value.code == 2
        assert "with commas between" in capsys.readouterr().err
