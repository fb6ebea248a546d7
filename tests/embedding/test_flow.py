from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from fake_embedder import FakeEmbedder
from PIL import Image

from longclip_rt.embedding.flow import Flow, FlowOptions
from longclip_rt.embedding.inputs.entries import Entry


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()


def many_images(count: int, slow: int | None = None) -> list[Entry]:
    entries = []
    for index in range(count):
        name = f"data/{'slow' if index == slow else 'x'}{index}.png"
        Image.new("RGB", (4, 4), (index % 256, 1, 2)).save(name)
        entries.append(Entry(index + 1, name, "image"))
    return entries


def test_decoded_images_that_wait_are_few():
    embedder = FakeEmbedder(delay=0.01)
    flow = Flow(embedder, FlowOptions(workers=4), lambda entries: None)
    shards = list(flow.run([(0, many_images(200))]))
    assert len(shards[0].entries) == 200
    # Six groups of four images: two in the encoder, two ready, one of the workers, one that may wait.
    assert embedder.transform.most_waiting <= 24


def test_one_slow_image_does_not_hold_up_the_others():
    embedder = FakeEmbedder()
    done = 0

    def advance(entries):
        nonlocal done
        done += entries
        if done == 96:  # All but the slow image's group of four.
            embedder.transform.slow.set()

    (shard,) = Flow(embedder, FlowOptions(workers=2), advance).run([(0, many_images(100, slow=1))])
    assert embedder.transform.slow.is_set()
    assert (done, shard.errors) == (100, {})


def test_shards_are_read_only_a_little_ahead():
    opened = []

    def source():
        for number in range(20):
            opened.append(number)
            yield number, [Entry(line, f"text {line}", "text", True) for line in range(50)]

    flow = Flow(FakeEmbedder(), FlowOptions(workers=2), lambda entries: None)
    for shard in flow.run(source()):
        # Besides the one that is yielded, two are open.
        assert len(opened) <= shard.number + 3


def test_decoding_overlaps_with_encoding():
    """The next shard's images are decoded while this one's last batch is being encoded."""
    embedder = FakeEmbedder()
    entries = many_images(8)
    decoded_meanwhile = threading.Event()
    encode = embedder.encode_crops

    def encode_when_the_next_shard_is_decoded(crops):
        deadline = time.monotonic() + 10
        while len(embedder.transform.decoded) < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        if len(embedder.transform.decoded) == 8:
            decoded_meanwhile.set()
        return encode(crops)

    embedder.encode_crops = encode_when_the_next_shard_is_decoded
    flow = Flow(embedder, FlowOptions(workers=2), lambda entries: None)
    assert [shard.number for shard in flow.run([(0, entries[:4]), (1, entries[4:])])] == [0, 1]
    assert decoded_meanwhile.is_set()


def test_a_run_that_is_closed_early_leaves_no_threads():
    flow = Flow(FakeEmbedder(), FlowOptions(workers=3), lambda entries: None)
    before = set(threading.enumerate())  # other tests' servers and embedders among them
    run = flow.run(enumerate([many_images(4)] * 50))
    next(run)
    run.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("longclip")]
