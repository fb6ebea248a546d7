from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longclip_rt.errors import OutputError
from longclip_rt.search.gallery import page_from_answer, save_gallery
from longclip_rt.search.hits import Hit
from longclip_rt.search.nearest import Answer
from longclip_rt.search.page import THUMBNAIL_PIXELS

EXAMPLES = Path(__file__).parents[2] / "examples"
VOID = {"meta", "img", "br", "rect", "path"}


class Page(HTMLParser):
    """Parses a page strictly: every element is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.tags if name in attributes.get("class", "").split()]

    def pictures(self) -> list[Image.Image]:
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                head, _, data = attributes["src"].partition(",")
                assert head == "data:image/jpeg;base64"
                found.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
        return found


def hit(id_: str, kind: str = "image", rank: int = 1, score: float = 0.3, row: int = 0) -> Hit:
    return Hit(rank, score, id_, kind, row)


def answer(*hits: Hit, base: Path | str = EXAMPLES, **changes: object) -> Answer:
    metadata = {"longclip_rt.base": str(base), "longclip_rt.trained": "true"}
    describe = {"bundle": "3f9c" * 16, "model": "ViT-B-16", "backend": "openvino", "backend_version": "2026.4"}
    plain = Answer("a red cup", "text", list(hits), Path("e.parquet"), metadata, describe | {"precision": "bf16"})
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def page(*hits: Hit, **changes: object) -> Page:
    return Page(page_from_answer(answer(*hits, **changes)))  # type: ignore[arg-type]


def test_page_loads_nothing_and_runs_nothing() -> None:
    source = page_from_answer(answer(hit("photos/coffee.jpg"), hit("texts/coffee.long.txt", "text", 2, 0.2)))
    parsed = Page(source)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    assert not re.search(r"https?:|url\(|@import", source)
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    policy = [attributes["content"] for tag, attributes in parsed.tags if "content" in attributes and tag == "meta"]
    assert any("default-src 'none'" in content and "img-src data:" in content for content in policy)


def test_a_picture_becomes_a_small_jpeg_with_its_facts() -> None:
    parsed = page(hit("photos/retina.jpg", rank=3, score=0.28764, row=9))
    (picture,) = parsed.pictures()
    assert picture.format == "JPEG"
    assert max(picture.size) <= THUMBNAIL_PIXELS
    assert "#3" in parsed.text
    assert "0.2876" in parsed.text
    assert "photos/retina.jpg" in parsed.text


def test_thumbnail_looks_like_the_photograph() -> None:
    (picture,) = page(hit("photos/coffee.jpg")).pictures()
    with Image.open(EXAMPLES / "photos/coffee.jpg") as original:
        expected = original.resize((30, 20), Image.Resampling.BOX)
    found = picture.resize((30, 20), Image.Resampling.BOX)
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    assert difference.mean() < 4


def test_a_text_file_shows_its_beginning_and_a_text_itself() -> None:
    words = "مرحبا a text that is its own id"
    parsed = page(hit("texts/coffee.long.txt", "text"), hit(words, "text", 2, 0.1, row=41))
    assert "Seen from above at an angle, a small, thick-walled espresso cup" in parsed.text
    assert parsed.text.count(words) == 1
    assert "row 41" in parsed.text
    assert parsed.pictures() == []


def test_where_lines_are_texts_no_file_is_read() -> None:
    texts = {"longclip_rt.lines_are": "texts", "longclip_rt.base": str(EXAMPLES)}
    parsed = page(hit("texts/coffee.long.txt", "text", row=7), metadata=texts)
    assert "texts/coffee.long.txt" in parsed.text
    assert "Seen from above" not in parsed.text
    assert "row 7" in parsed.text


def test_a_long_text_is_cut() -> None:
    parsed = page(hit("word " * 5000, "text"))
    assert 300 < parsed.text.count("word") * 5 < 1000
    assert "…" in parsed.text


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("broken/truncated.jpg", "image", "incomplete or damaged"),
        ("broken/empty.jpg", "image", "not a picture"),
        ("broken/not_an_image.jpg", "image", "not a picture"),
        ("broken/bomb.png", "image", "too many pixels"),
        ("broken/missing.jpg", "image", "file not found"),
        ("broken", "image", "file not found"),
        ("gone.txt", "text", "file not found"),
        ("x" * 3000 + ".jpg", "image", "file not found"),
        ("nul\0.jpg", "image", "file not found"),
        ("", "image", "file not found"),
    ],
)
def test_what_cannot_be_shown_gets_a_tile_with_the_reason(name: str, kind: str, reason: str) -> None:
    parsed = page(hit(name, kind), hit("photos/clock.jpg", rank=2))
    assert reason in parsed.text
    assert len(parsed.of_class("absent")) == 1
    assert len(parsed.of_class("card")) == 2
    assert len(parsed.pictures()) == 1


def test_a_picture_of_more_pixels_than_allowed_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (40, 30)).save(tmp_path / "wide.png")
    monkeypatch.setattr("longclip_rt.search.page._MAX_PIXELS", 1000)
    assert "too many pixels (40 × 30)" in page(hit("wide.png"), base=tmp_path).text


def test_everything_is_escaped() -> None:
    evil = "<script>alert('1')</script>\"><img src=x onerror=alert(1)>&amp;"
    shown = answer(hit(evil, "text"), hit(evil + ".jpg", rank=2), base=evil, query=evil, path=Path("a<b>.parquet"))
    shown = dataclasses.replace(shown, embedder={"model": evil, "bundle": evil, "backend": evil, "precision": evil})
    parsed = Page(page_from_answer(shown))
    assert {tag for tag, _ in parsed.tags} & {"script", "img"} == set()
    assert parsed.text.count(evil) >= 4
    assert parsed.of_class("id")[1]["title"] == evil + ".jpg"


def test_control_characters_and_lone_surrogates_do_not_reach_the_page(tmp_path: Path) -> None:
    save_gallery(answer(hit("a\x1b\x00b\udc80", "text"), query="q\x07\udfff"), tmp_path / "page.html")
    written = (tmp_path / "page.html").read_text("utf-8")
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", written)
    assert "a��b�" in Page(written).text


def test_ids_are_found_from_the_working_directory_then_the_embeddings_then_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / name for name in ("work", "embeddings", "list", "list2")]
    for shade, place in enumerate(places):
        place.mkdir()
        Image.new("L", (32, 32), 60 * shade).save(place / "p.png")
    monkeypatch.chdir(places[0])
    base = os.pathsep.join([str(places[2]), str(places[3])])
    for shade, place in enumerate(places):
        (picture,) = page(hit("p.png"), base=base, path=places[1] / "e.parquet").pictures()
        assert abs(int(np.asarray(picture).mean()) - 60 * shade) <= 1
        (place / "p.png").unlink()
    Image.new("L", (32, 32), 200).save(tmp_path / "absolute.png")
    assert len(page(hit(str(tmp_path / "absolute.png"))).pictures()) == 1


def test_the_warning_is_there_only_for_an_untrained_model() -> None:
    assert "untrained" not in page(hit("photos/coffee.jpg")).text
    untrained = page(hit("photos/coffee.jpg"), metadata={"longclip_rt.trained": "false"})
    assert "The model is untrained" in untrained.text
    assert len(untrained.of_class("warning")) == 1


def test_bars_compare_scores_with_the_best() -> None:
    parsed = page(*(hit("x", "text", rank, score) for rank, score in enumerate([0.4, 0.1, -0.2], 1)))
    widths = [attributes["style"] for _, attributes in parsed.tags if "style" in attributes]
    assert widths == ["width:100.0%", "width:25.0%", "width:0.0%"]
    assert "−0.2000" in parsed.text
    negative = page(hit("x", "text", 1, -0.1))
    assert [attributes["style"] for _, attributes in negative.tags if "style" in attributes] == ["width:0.0%"]


def test_the_query_is_shown_with_its_truncation() -> None:
    parsed = page(hit("x", "text"), query="long " * 300, tokens=302, truncated=True)
    assert "302 tokens" in parsed.text
    assert parsed.of_class("long")
    assert not page(hit("x", "text")).of_class("long")
    assert "1 nearest neighbour in e.parquet" in page(hit("x", "text")).text


def test_an_image_query_shows_the_picture_or_why_not() -> None:
    shown = page(hit("x", "text"), query=str(EXAMPLES / "photos/chelsea.jpg"), query_kind="image")
    assert len(shown.pictures()) == 1
    assert "chelsea.jpg" in shown.text
    gone = page(hit("x", "text"), query="gone.jpg", query_kind="image")
    assert gone.pictures() == []
    assert "file not found" in gone.text


def test_no_hits_still_make_a_page() -> None:
    parsed = page()
    assert "nothing of that kind" in parsed.text
    assert parsed.of_class("card") == []


def test_the_footer_names_the_model() -> None:
    text = page(hit("x", "text")).text
    for fact in ("ViT-B-16", "3f9c3f9c3f9c", "openvino 2026.4", "bf16", "e.parquet"):
        assert fact in text


def shades(tmp_path: Path, name: str) -> np.ndarray:
    (picture,) = page(hit(name), base=tmp_path).pictures()
    assert picture.mode == "RGB"
    return np.asarray(picture, np.float64)


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (20, 20), 3)
    palette.putpalette([10, 20, 30] * 16)
    palette.save(tmp_path / "palette.png", transparency=3)
    np.testing.assert_allclose(shades(tmp_path, "clear.png"), 255, atol=2)
    np.testing.assert_allclose(shades(tmp_path, "palette.png"), 255, atol=2)


def test_sixteen_bits_and_cmyk_and_animations_are_shown(tmp_path: Path) -> None:
    ramp = np.linspace(1000, 60000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    shown = shades(tmp_path, "deep.png")
    assert shown[0].mean() < 10 and shown[-1].mean() > 245
    assert 110 < shown[32].mean() < 145
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red = shades(tmp_path, "print.jpg").mean(axis=(0, 1))
    assert red[0] > 200 and red[1] < 60 and red[2] < 60
    frames = [Image.new("L", (20, 20), shade) for shade in (40, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(shades(tmp_path, "moving.gif"), 40, atol=3)


def test_a_picture_taken_sideways_is_shown_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.new("RGB", (60, 20), "blue").save(tmp_path / "turned.jpg", exif=exif)
    assert shades(tmp_path, "turned.jpg").shape == (60, 20, 3)


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"page\.html"):
        save_gallery(answer(hit("x", "text")), tmp_path / "gone" / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("old")
    save_gallery(answer(hit("x", "text")), target)
    assert target.read_text("utf-8") == page_from_answer(answer(hit("x", "text")))
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
