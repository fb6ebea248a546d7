"""Draws examples/scenes/: six scenes of seven things, and beside each three that differ from it in one detail.

    python examples/make_scenes.py

They are the first six of a seed that nothing was trained on, not chosen. With seven things, the details of the last
three stand where CLIP's 77 tokens have ended. Needs the base package only.
"""

from __future__ import annotations

import json
from pathlib import Path

from longclip_rt.train.scenes import long_caption, render, scene, twin

FOLDER = Path(__file__).parent / "scenes"
SEED = (1 << 30) + 1
SCENES, THINGS, TWINS, PIXELS = 6, 7, 3, 192


def main() -> None:
    """Writes PNG images, captions.json, a .txt file with each scene's long caption, and the list files.txt."""
    FOLDER.mkdir(exist_ok=True)
    rows = []
    for number in range(SCENES):
        original = scene(SEED, number, (THINGS, THINGS))
        caption = long_caption(original)
        (FOLDER / f"scene-{number}.txt").write_text(caption + "\n", encoding="utf-8")
        drawn = [(f"scene-{number}.png", original, caption, "")]
        for index in range(TWINS):
            # The last thing of the caption, the one before it, and so on: the details that stand latest.
            other = twin(
                original, index, which=len(original.things) - 1 - index, detail=("colour", "texture")[index % 2]
            )
            drawn.append(
                (f"scene-{number}-{index + 1}.png", other.scene, other.caption, f"{other.before} -> {other.after}")
            )
        for name, one, text, change in drawn:
            render(one, PIXELS).save(FOLDER / name, optimize=True)
            rows.append({"image": name, "scene": number, "caption": text, "change": change})
    (FOLDER / "captions.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "files.txt").write_text("".join(f"{row['image']}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
