"""Packaging. The code of export/, kernels/ and train/ is installed as longclip_rt.export and so on, through links."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (ROOT / "longclip_rt/version.py").read_text(encoding="utf-8"))
assert version

EXPORT = [
    "torch>=2.9",  # the first whose exporter maps scaled_dot_product_attention to the Attention operator of opset 23
    "open_clip_torch>=3.0",
    "onnx>=1.18",  # opset 23
    "onnxscript>=0.5",
]

LINUX = "platform_system == 'Linux' and platform_machine == 'x86_64'"

# What builds TensorRT-RTX engines, on any machine; ONNX, since the graphs are changed a little on the way.
RTX = [f"tensorrt-rtx>=1.7; {LINUX}", "onnx>=1.18"]

INT8 = ["nncf>=3.0"]  # it holds numpy below 2.5

TRAIN = [
    *EXPORT,
    "matplotlib>=3.8",
    "tensorboard>=2.16",
    "webdataset>=0.2.100",
]

# Other evaluators, open_clip's class names and templates, and data in shards; `evaluate` runs without on much else.
EVALUATE = [
    "clip-benchmark>=1.6.2",
    "mteb>=2.26",
    "open_clip_torch>=3.0",
    "webdataset>=0.2.100",
]

# Libraries that a bundle can be put into, each with the extra of its name; the oldest versions that were tried.
SENTENCE_TRANSFORMERS = ["sentence-transformers>=6.2", "torch>=2.9"]

SERVE = [
    "fastapi>=0.115",
    "httptools>=0.6",
    "prometheus-client>=0.20",
    "python-multipart>=0.0.18",
    "uvicorn>=0.54",
]

# onnx: the final norm is read from the graph.
DIFFUSERS = ["diffusers>=0.42", "onnx>=1.18", "torch>=2.9", "transformers>=5.0"]

LANCE = ["lancedb>=0.40", "pylance>=14.0"]
RAY = ["ray[data]>=2.60"]
FAISS = ["faiss-cpu>=1.15"]

# What the tests need beside the package; not ONNX Runtime, of which there is one for CPUs and one for GPUs.
TEST = [
    *TRAIN,
    *EVALUATE,
    *RTX,
    *DIFFUSERS,
    *FAISS,
    *LANCE,
    *INT8,
    *RAY,
    *SENTENCE_TRANSFORMERS,
    *SERVE,
    "datasets>=4.0",
    "duckdb>=1.4",
    "hypothesis>=6.100",
    "openai>=1.60",
    "pandas>=2.2",
    "playwright>=1.40",  # drives a Chromium that is installed; without one its tests are skipped
    "polars>=1.30",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "PyYAML>=6.0",
    "qdrant-client>=1.16",
    "regex>=2024.0",
    "schemathesis>=4.0",
    "scikit-learn>=1.4",
    "torchvision>=0.24",
    "transformers>=5.0",
]

setup(
    name="longclip-rt",
    version=version[1],
    description="Long-CLIP inference: ONNX export with a parity gate, resumable embedding of texts and images, search",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["longclip_rt", "longclip_rt.*"], exclude=["longclip_rt.assets*"]),
    package_data={
        "longclip_rt": [
            "py.typed",
            "assets/examples/captions.json",
            "assets/examples/photos/*.jpg",
            "assets/examples/unicode.txt",
            "serving/page/*",
            "assets/tiny/*",  # the built-in model: an exported bundle and its model card
        ]
    },
    install_requires=[
        "click>=8.1",
        "ftfy>=6.1",
        "huggingface_hub>=1.0",
        "msgspec>=0.19",
        "numpy>=1.26",
        "openvino>=2026.0",  # the first that was tried with the Attention operator of opset 23
        "Pillow>=10.1",
        "platformdirs>=4.0",
        "pyarrow>=16.0",
        "safetensors>=0.5",
        "tokenizers>=0.20",
        "tqdm>=4.60",
    ],
    extras_require={
        "cpu": ["onnxruntime>=1.23"],
        # ONNX Runtime: the oldest that was tried with telling which provider got which node.
        "gpu": ["onnxruntime-gpu[cuda,cudnn]>=1.31", "cuda-core[cu13]>=1.2"],
        # 10.14: the first with attention layers. The libraries themselves come from NVIDIA's own index.
        "tensorrt": ["tensorrt>=10.14", "onnx>=1.18"],
        "rtx": RTX,
        "export": EXPORT,
        "int8": INT8,
        "train": TRAIN,
        "evaluate": EVALUATE,
        "diffusers": DIFFUSERS,
        "faiss": FAISS,
        "lance": LANCE,
        "sentence-transformers": SENTENCE_TRANSFORMERS,
        "serve": SERVE,
        "ray": RAY,
        "plot": ["matplotlib>=3.8"],
        # What `bench --against reference` runs beside the backends.
        "bench": [*EXPORT, "matplotlib>=3.8", "transformers>=5.0"],
        "test": TEST,
        "dev": [
            *TEST,
            "onnxruntime>=1.31",
            # cuda.core imports without a GPU; beside torch the bindings are there already.
            "cuda-core>=1.2",
            "cuda-bindings>=13; platform_system == 'Linux'",
            # TensorRT's Python bindings without TensorRT, which the code's calls are checked against.
            f"tensorrt_cu13_bindings==11.4.0.106; {LINUX}",
            "mypy>=1.15",
            "ruff>=0.12",
        ],
    },
    entry_points={"console_scripts": ["longclip-rt=longclip_rt.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
