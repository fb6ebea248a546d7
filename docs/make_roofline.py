"""Writes the computed tables of docs/performance.md between their markers; tests/bench holds the two equal."""

from __future__ import annotations

from pathlib import Path

from longclip_rt.bench.roofline import tables
from longclip_rt.model.architecture import LONG_CONTEXT_LENGTH, Architecture

PAGE = Path(__file__).parent / "performance.md"
BEGIN, END = "<!-- computed by docs/make_roofline.py -->\n", "<!-- end of what is computed -->\n"

MODELS = {
    "ViT-B/16": Architecture(224, 16, 768, 12, 512, 12, 512, context_length=LONG_CONTEXT_LENGTH),
    "ViT-L/14": Architecture(224, 14, 1024, 24, 768, 12, 768, context_length=LONG_CONTEXT_LENGTH),
}


def computed() -> str:
    """The tables of every model, in Markdown."""
    return "\n".join(f"### {name}\n\n{chr(10).join(tables(model))}\n" for name, model in MODELS.items())


def main() -> None:
    """Puts them into the page."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(head + BEGIN + "\n" + computed() + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
