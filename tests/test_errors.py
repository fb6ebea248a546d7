from __future__ import annotations

from longclip_rt.errors import LongClipError, WeightsError


def test_a_message_cannot_steer_the_terminal_nor_fill_the_screen() -> None:
    assert str(WeightsError("a\x1b[31m\0 é\ncup \ud800")) == "a\\x1b[31m\\x00 é\ncup \\ud800"
    assert str(LongClipError("x" * 3000)) == "x" * 2000 + "..."
