from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from longclip_rt.errors import InputError
from longclip_rt.model.cleaning import needs_repair, repair_text

REFERENCE = SimpleTokenizer()
ANY = st.text(st.characters(exclude_categories=()))


@settings(max_examples=300, deadline=None)
@given(text=ANY | st.text(st.characters(max_codepoint=127)))
@example(text="&amp;amp;AMP\u00a0\u00c3\u00a9 \r\n\x1b[31mred \ud83d\ude00 \ud83d")
def test_texts_are_cleaned_as_in_the_reference(text: str) -> None:
    expected = REFERENCE.clean_fn(text)
    assert repair_text(text) == expected
    if not needs_repair(text):
        assert " ".join(text.split()).lower() == expected


@pytest.mark.parametrize("text", ["", "A dog & a cat.", "a\tb\r\nc", "R&", "<b>"])
def test_plain_texts_need_no_repair(text: str) -> None:
    assert not needs_repair(text)


@pytest.mark.parametrize("text", ["caf\u00e9", "AT&T", "&amp;", "\x00", "\x0b", "\x7f", "\ud800"])
def test_all_others_do(text: str) -> None:
    assert needs_repair(text)


def test_a_reference_that_python_refuses_is_an_input_error() -> None:
    text = "&#" + "1" * 5000 + ";"
    with pytest.raises(InputError, match=r"^It holds a character reference that cannot be decoded: "):
        repair_text(text)
    with pytest.raises(InputError, match=r"^Text 3 holds"):
        repair_text(text, "Text 3")


def test_it_imports_little() -> None:
    code = (
        "import sys; from longclip_rt.model.cleaning import repair_text; repair_text('caf\\u00e9'); "
        "print(sorted({'numpy', 'pyarrow', 'tokenizers', 'openvino', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
