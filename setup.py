"""Packaging of megatron_prune. Settings of the tools (ruff, mypy, pytest) are in pyproject.toml.

PyPI's ``apex`` is deliberately not listed: it is an unrelated web toolkit, not NVIDIA Apex.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The version string in megatron_prune/__init__.py, read without importing the package."""
    text = (ROOT / "megatron_prune" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('megatron_prune/__init__.py lacks a line __version__ = "…"')
    return found.group(1)


def read_me() -> str:
    path = ROOT / "README.md"
    return path.read_text() if path.exists() else ""


setup(
    name="megatron-prune",
    version=version(),
    description="Prune Megatron checkpoints, train them on, and compare with training from scratch",
    long_description=read_me(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_prune", "megatron_prune.*"]),
    package_data={
        "megatron_prune": [
            "py.typed",
            "study/report/*.j2",
            "evaluation/*.yaml",
            "checkpoint/*.json",
            "engine/*.json",
            "study/advise/*.json",
            "study/run/*.j2",
            "launch/*",
        ]
    },
    entry_points={"console_scripts": ["megatron-prune = megatron_prune.__main__:console"]},
    install_requires=[
        "megatron-core[training]>=0.19.2,<0.20",
        "torch>=2.6",
        "numpy>=2.0",
        "scipy>=1.13",
        "transformers>=4.51",
        "huggingface-hub>=0.30",
        "tokenizers>=0.21",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2.0",
        "tiktoken>=0.9",
        "nltk>=3.9",
        "pyarrow>=17",
        "backports.zstd>=1.0; python_version < '3.14'",  # the standard library has it from 3.14 on
        "datasketch>=1.6",
        "tensorboard>=2.17",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "pydantic>=2.9",
        "pyyaml>=6.0",
        "packaging>=24",
        "rich>=13.7",
        "tqdm>=4.66",
    ],
    extras_require={
        "datasets": ["datasets>=3.0", "zstandard>=0.23"],  # which datasets needs for shards in zstd
        "array-record": ["array_record>=0.8"],
        "fp8-sparse": ["torchao>=0.18"],  # `benchmark` of 2:4 models in FP8, on a GPU
        "eval": ["lm-eval>=0.4.13,<0.5"],
        "gguf": ["gguf>=0.10"],  # `convert export --gguf`
        # The stores' own clients come with its extras: multi-storage-client[boto3], …
        "msc": ["multi-storage-client>=1.3"],
        "te": ["transformer-engine[core_cu13,pytorch]", "nvidia-curand"],
        "docs": ["mkdocs-material>=9.5,<10"],
        "dev": [
            "pytest>=8.2",
            "pytest-cov>=7",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "import-linter>=2.11",
            "networkx>=3",
            "ruff>=0.8",
            "mypy>=1.13",
            "datasets>=3.0",
            "array_record>=0.8",
            "gguf>=0.10",
            "lm-eval>=0.4.13,<0.5",
            "multi-storage-client[boto3]>=1.3",
            "moto[s3]>=5",
            "flask>=3",
            "flask-cors>=4",
            "mkdocs-material>=9.5,<10",
            "types-PyYAML",
            "types-tqdm",
            "zstandard>=0.23",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
