from __future__ import annotations

import importlib.util
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from longclip_rt.bundle.samples import EXACT_LENGTHS, example_captions, example_photos, parity_texts, unicode_texts
from longclip_rt.errors import LongClipError

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@dataclass
class Length:
    length: int


class Measure:
    """Counts tokens as open_clip does, with SOT and EOT."""

    def __init__(self) -> None:
        self.vocabulary = SimpleTokenizer(context_length=248)

    def encode(self, texts: Any) -> list[Length]:
        return [Length(len(self.vocabulary.encode(text)) + 2) for text in texts]

    def __call__(self, text: str) -> int:
        return self.encode([text])[0].length


@pytest.fixture(scope="module")
def measure() -> Measure:
    return Measure()


@pytest.fixture(scope="module")
def texts(measure: Measure) -> list[str]:
    return parity_texts(measure)


def test_there_are_at_least_ten_photographs_that_decode() -> None:
    photos = example_photos()
    assert len(photos) >= 10
    assert len(set(photos)) == len(photos)
    for photo in photos:
        with Image.open(photo) as image:
            image.load()
            assert image.format == "JPEG"
            assert image.mode in ("RGB", "L")
            assert min(image.size) > 100


def test_photographs_differ_in_what_the_transform_has_to_do() -> None:
    sizes, modes = set(), set()
    for photo in example_photos():
        with Image.open(photo) as image:
            sizes.add(image.size)
            modes.add(image.mode)
    assert modes == {"RGB", "L"}
    assert any(min(size) < 224 for size in sizes)
    assert any(width > height for width, height in sizes)
    assert any(width == height for width, height in sizes)


def test_every_photograph_is_captioned_and_the_folder_is_small() -> None:
    assert sorted(photo.name for photo in example_photos()) == sorted(p.name for p in (EXAMPLES / "photos").iterdir())
    assert sum(file.stat().st_size for file in EXAMPLES.rglob("*") if file.is_file()) < 2_000_000


def test_captions_are_as_long_as_promised(measure: Measure) -> None:
    for caption in example_captions():
        assert 8 <= len(caption.short.split()) <= 20, caption.photo
        assert 120 <= measure(caption.long) <= 246, caption.photo
        assert caption.short.count(". ") == 0
        assert "\n" not in caption.long


def test_text_files_hold_the_captions() -> None:
    expected = {}
    for caption in example_captions():
        expected[f"{caption.photo.stem}.short.txt"] = caption.short + "\n"
        expected[f"{caption.photo.stem}.long.txt"] = caption.long + "\n"
    assert {file.name: file.read_text("utf-8") for file in (EXAMPLES / "texts").iterdir()} == expected


def test_the_list_names_everything_and_holds_a_comment_and_an_empty_line() -> None:
    lines = (EXAMPLES / "files.txt").read_text("utf-8").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    assert "" in lines
    assert len([line for line in lines if line.startswith("#")]) == 1
    everything = [*(EXAMPLES / "photos").iterdir(), *(EXAMPLES / "texts").iterdir()]
    assert sorted(entries) == sorted(str(file.relative_to(EXAMPLES)) for file in everything)


def test_readme_gives_a_free_licence_for_every_photograph() -> None:
    rows = [line for line in (EXAMPLES / "README.md").read_text("utf-8").splitlines() if ".jpg |" in line]
    licences = {row.split("|")[1].strip(): row.split("|")[-2].strip() for row in rows}
    for photo in example_photos():
        assert licences[photo.name] in ("CC0", "public domain")


def test_broken_list_names_every_broken_file_a_missing_one_and_good_ones() -> None:
    folder = EXAMPLES / "broken"
    lines = [line for line in (folder / "files.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    bad = {line for line in lines if not line.startswith("..")}
    assert bad == {file.name for file in folder.iterdir() if file.name != "files.txt"} | {"missing.jpg"}
    good = [line for line in lines if line.startswith("..")]
    assert len(good) == 3
    assert all((folder / line).is_file() for line in good)


def test_broken_files_are_broken() -> None:
    folder = EXAMPLES / "broken"
    assert (folder / "empty.jpg").stat().st_size == 0
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(folder / "not_an_image.jpg")
    with Image.open(folder / "truncated.jpg") as image, pytest.raises(OSError, match="truncated"):
        image.load()
    with pytest.raises(Image.DecompressionBombError):
        Image.open(folder / "bomb.png")
    assert (folder / "bomb.png").stat().st_size < 1000
    with pytest.raises(UnicodeDecodeError):
        (folder / "latin1.txt").read_text("utf-8")


def test_parity_texts_reach_every_length_exactly(texts: list[str], measure: Measure) -> None:
    lengths = [measure(text) for text in texts]
    assert len(texts) >= 32
    assert {2, *EXACT_LENGTHS, 249} <= set(lengths)
    assert max(lengths) > 1000
    assert "" in texts


def test_parity_texts_are_distinct_and_always_the_same(texts: list[str], measure: Measure) -> None:
    assert len(set(texts)) == len(texts)
    assert parity_texts(measure) == texts


def test_parity_texts_hold_the_captions_and_many_scripts(texts: list[str]) -> None:
    assert {caption.long for caption in example_captions()} <= set(texts)
    assert set(unicode_texts()) <= set(texts)
    letters = {character for text in texts for character in text if character.isalpha()}
    scripts = {unicodedata.name(letter, "").split()[0] for letter in letters}
    assert {"LATIN", "GREEK", "CYRILLIC", "CJK", "HIRAGANA", "HANGUL"} <= scripts
    assert {"ARABIC", "HEBREW", "DEVANAGARI", "THAI"} <= scripts
    assert any("\N{FACE WITH TEARS OF JOY}" in text for text in texts)
    assert any("&amp;" in text for text in texts)


def test_parity_texts_refuse_a_tokenizer_that_cannot_make_the_lengths() -> None:
    class Giant:
        def encode(self, texts: Any) -> list[Length]:
            return [Length(1000) for _ in texts]

    with pytest.raises(LongClipError, match="exactly 3 tokens"):
        parity_texts(Giant())


def test_missing_data_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("longclip_rt.bundle.samples._FOLDER", tmp_path)
    with pytest.raises(LongClipError, match=r"captions\.json.*install longclip-rt again"):
        example_captions()


def test_mixed_lengths_is_what_its_script_writes(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("make", ROOT / "benchmarks" / "make_mixed_lengths.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    committed = script.TARGET.read_text("utf-8")
    monkeypatch.setattr(script, "TARGET", tmp_path / "again.txt")
    script.main()
    assert (tmp_path / "again.txt").read_text("utf-8") == committed
    lengths = [measure(text) for text in committed.splitlines()]
    assert len(lengths) == len(set(committed.splitlines())) == 200
    assert sum(8 <= length <= 32 for length in lengths) == 100
    assert sum(120 <= length <= 248 for length in lengths) == 100
