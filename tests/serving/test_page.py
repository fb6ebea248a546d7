"""The page at `/` in a headless browser, where one is installed; its look is for people to judge."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_search import EXAMPLES, index_of

from longclip_rt import Embedder
from longclip_rt.serving.server import Options

LONG = "a red cup on a table beside a window, " * 40


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails the test for any error of a script and for anything loaded from elsewhere."""
    opened = browser.new_page()
    faults: list[str] = []
    addresses: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda request: addresses.append(request.url))
    yield opened
    opened.close()
    assert faults == []
    assert all(one.startswith(("http://127.0.0.1:", "data:", "blob:http://127.0.0.1:")) for one in addresses), addresses


def test_photographs_are_ranked_for_a_text(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#model:has-text('ViT')")
    page.keyboard.press("Tab")  # with the keyboard alone, but for the files
    page.keyboard.type("a cup")
    page.wait_for_selector("#count:text-is('4 tokens')")
    page.set_input_files("#files", [str(path) for path in sorted((EXAMPLES / "photos").glob("*.jpg"))[:3]])
    page.wait_for_selector("#chosen img >> nth=2")
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#hits .card >> nth=2")
    scores = [float(one.replace("−", "-")) for one in page.locator("#hits .score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    page.focus("#clear")
    page.keyboard.press("Enter")
    assert page.locator("#hits .card").count() == 0 and page.input_value("#text") == ""
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#status.failed")
    assert "Type a text" in page.inner_text("#status")


def test_words_beyond_77_tokens_and_beyond_the_models_are_marked(page: Any, url: str, embedder: Embedder) -> None:
    page.goto(url)
    page.fill("#text", LONG)
    page.wait_for_selector("#words .unread")
    plain, beyond, unread = (
        page.locator(f"#words span{name}").all_inner_texts() for name in ('[class=""]', ".beyond", ".unread")
    )
    assert [*plain, *beyond, *unread] == LONG.split()
    encode = embedder.tokenizer.encode
    for read, limit in ((plain, 77), (plain + beyond, embedder.context_length)):
        following = LONG.split()[len(read)]
        assert encode([" ".join(read)])[0].length <= limit < encode([" ".join([*read, following])])[0].length


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_collection_is_searched(
    scheme: str, browser: Any, page: Any, serve: Any, tmp_path: Path, embedder: Embedder
) -> None:
    index = index_of(tmp_path / "index.parquet", embedder)
    with serve(Options(index=index, pictures=tmp_path / "pictures", key="k")) as url:
        page.emulate_media(color_scheme=scheme)
        page.goto(url)
        page.wait_for_selector("#key-field", state="visible")
        page.fill("#key", "k")
        page.keyboard.press("Tab")
        page.wait_for_selector("#title:text-is('Search 8 embeddings')")
        page.fill("#text", "a cup of coffee")
        page.click("#go")
        page.wait_for_selector("#hits .card >> nth=6")
        assert page.locator("#hits .tile img").count() == 4
        page.select_option("#kind", "text")
        page.click("#go")
        page.wait_for_selector("#hits .words p")
        assert page.inner_text("#hits .words p") == "a cup of coffee"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 22)"
        assert dark == (scheme == "dark")


def test_the_page_may_load_nothing_from_elsewhere(client: httpx.Client) -> None:
    policy = client.get("/").headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    for path in ("/", "/page.js", "/page.css"):
        assert "//" not in client.get(path).text.replace("// ", "")
