"""What do TensorRT engines cost to build: time, size on disk, and memory on the GPU, by text length and batch range?

    python benchmarks/engines.py --bundle demo/vit-b-16                      # TensorRT-RTX, on any machine
    python benchmarks/engines.py --bundle demo/vit-b-16 --bundle demo/vit-l-14 --arch sm89 --arch sm120
    python benchmarks/engines.py --bundle demo/vit-b-16 --engine tensorrt    # on a machine with a GPU and TensorRT

A bundle of random weights does, since only the shapes matter: `make demo/vit-b-16/bundle.json`, or, for L/14,
`longclip-rt export --fp16 --weights random:ViT-L-14 --out demo/vit-l-14`. Engines are built in a temporary folder and
thrown away. Memory is what the builder gives for each profile; nothing is run. Writes results/engines.csv.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import save_table

from longclip_rt.bundle.bundle import MANIFEST, Bundle, load_bundle
from longclip_rt.choices import BATCHES, LIBRARIES, TEXT_BUCKETS
from longclip_rt.commands.engine_options import fused_attention
from longclip_rt.export.tensorrt.build import EngineOptions, build_engines, choose_builders


def numbers(text: str) -> tuple[int, ...]:
    """Numbers with commas between them."""
    return tuple(int(part) for part in text.split(","))


def borrowed(bundle: Bundle, folder: Path) -> Bundle:
    """The same bundle in another folder, through links, so that its own engines are left alone."""
    for name in bundle.manifest["files"]:
        (folder / name).symlink_to(bundle.file(name))
    shutil.copy(bundle.file(MANIFEST), folder / MANIFEST)
    return load_bundle(folder, verify=False)


def rows_of(bundle: Bundle, engine: Any) -> list[dict[str, object]]:
    """A row a profile; what belongs to the whole plan stands in its first row."""
    rows: list[dict[str, object]] = []
    for tower, facts in engine.towers.items():
        for profile in facts["profiles"]:
            first = profile["index"] == 0
            rows.append(
                {
                    "model": bundle.name,
                    "tower": tower,
                    "library": f"{engine.key.library} {engine.key.version}",
                    "card": engine.key.gpu or f"sm_{engine.key.archs[0]}",
                    "tokens": profile["length"] or "",
                    "rows": f"{profile['least']}-{profile['most']}",
                    "workspace MiB": mib(profile["memory"]),
                    "profiles": len(facts["profiles"]) if first else "",
                    "fused attention": fused_attention(facts) if first else "",
                    "fp32 products": facts["fp32_products"] if first else "",
                    "weights MiB": mib(facts["weights"]) if first else "",
                    "plan MiB": mib(facts["plan_bytes"]) if first else "",
                    "build s": facts["seconds"] if first else "",
                }
            )
    return rows


def mib(size: int | None) -> str:
    """Bytes for the table."""
    return "" if size is None else f"{size / 2**20:.1f}"


def main() -> None:
    """Builds, and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, action="append", required=True, help="may be repeated")
    parser.add_argument("--engine", choices=list(LIBRARIES), default="tensorrt-rtx")
    parser.add_argument("--arch", action="append", help="such as sm89, which is also the default for TensorRT-RTX")
    parser.add_argument("--text-buckets", type=numbers, default=TEXT_BUCKETS)
    parser.add_argument("--batches", type=numbers, default=BATCHES)
    arguments = parser.parse_args()
    archs = [int(name.removeprefix("sm")) for name in arguments.arch or []]
    if not archs and arguments.engine == "tensorrt-rtx":
        archs = [89]
    builders = choose_builders(arguments.engine, archs)
    options = EngineOptions("fp16", arguments.text_buckets, arguments.batches)
    rows: list[dict[str, object]] = []
    for path in arguments.bundle:
        bundle = load_bundle(path)
        with tempfile.TemporaryDirectory() as folder:
            for built in build_engines(borrowed(bundle, Path(folder)), builders, options):
                rows += rows_of(bundle, built.engine)
    save_table("engines", rows)


if __name__ == "__main__":
    main()
