from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from longclip_rt.bundle.bundle import BUILT_IN, load_bundle
from longclip_rt.commands.evaluate import evaluate
from longclip_rt.evaluation.collection import Collection
from longclip_rt.evaluation.data import DataName
from longclip_rt.evaluation.misses import marked, page_of_misses, worst
from longclip_rt.evaluation.models import Made
from longclip_rt.evaluation.retrieval import retrieve
from longclip_rt.evaluation.retrieval_run import RetrievalReport
from longclip_rt.evaluation.vectors import Embedded
from longclip_rt.metrics import Places

MODEL = BUILT_IN
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def report() -> RetrievalReport:
    """Pictures 1 and 2 and their captions each choose the other one's; picture 0 and its caption find each other."""
    axes = np.eye(4, dtype=np.float32)
    images = axes[:3].copy()
    texts = np.stack([axes[0], axes[2] * 0.8 + axes[1] * 0.6, axes[2] * 0.9 + axes[1]])
    files = tuple(EXAMPLES / f"scenes/scene-{number}.png" for number in range(3))
    captions = ("zero", "one <b>bold</b>", "two " + "word " * 300)
    collection = Collection(files, ("a", "b & c", "d"), captions, np.arange(3), ())
    vectors = Embedded(images, texts, np.array([3, 9, 400], np.int32), np.zeros(3, bool), {}, {}, 0)
    kept = collection.without({}, {})
    made = Made("a model", {"trained": "true"})
    found = retrieve(collection, kept, vectors)
    return RetrievalReport(DataName("table", "x"), collection, kept, (made,), (found,), load_bundle(MODEL).tokenizer, 0)


def test_the_page_shows_what_was_chosen_and_what_was_right(report: RetrievalReport) -> None:
    assert sorted(worst(report.retrievals[0].t2i, 9).tolist()) == [1, 2]
    page = page_of_misses(report, 20)
    cards = re.findall(r'<li class="miss.*?</li>', page, re.DOTALL)
    assert len(cards) == 4 and "<script" not in page and "http:" not in page and "https:" not in page
    (caption_one,) = [card for card in cards[:2] if "one &lt;b&gt;" in card]
    assert re.search(
        r"<b>Chosen</b>, place 1, 0.8000.*?alt=\"d\".*<b>Right</b>, place 2, 0.6000", caption_one, re.DOTALL
    )
    assert 'alt="b &amp; c"' in caption_one
    (picture_one,) = [card for card in cards[2:] if 'alt="b &amp; c"' in card]
    assert "<mark>" in picture_one.partition("<b>Right</b>, place 2")[0] and "one &lt;b&gt;" in picture_one
    assert page_of_misses(report, 1).count('<li class="miss') == 2


def test_the_worst_come_first_and_hits_not_at_all() -> None:
    above = np.array([0, 3, 1, 7])
    same, score = np.zeros(4, int), np.ones(4)
    assert worst(Places(above, same, score, same, same, score), 2).tolist() == [3, 1]


def test_words_beyond_clips_tokens_are_marked_and_unread_ones_struck_out(report: RetrievalReport) -> None:
    html = marked("word " * 300 + "<i>", report.tokenizer)
    plain, mark, struck = (
        len(part.split())
        for part in re.fullmatch(r'<p class="caption">(.*?) <mark>(.*?)</mark> <s>(.*?)</s></p>', html).groups()  # type: ignore[union-attr]
    )
    tokens = report.tokenizer.encode(["word " * (plain + mark)])[0].length
    assert plain == 75 and tokens == 248 and plain + mark + struck == 301 and "&lt;i&gt;" in html
    assert marked("short", report.tokenizer) == '<p class="caption">short</p>'


def test_the_command_writes_it(tmp_path: Path) -> None:
    arguments = ["retrieval", "--data", "scenes:8", "--bundle", str(MODEL), "--backend", "onnxruntime"]
    result = CliRunner().invoke(evaluate, [*arguments, "--html", str(tmp_path / "m.html")], catch_exceptions=False)
    assert result.exit_code == 0 and "Worst misses" in (tmp_path / "m.html").read_text()
