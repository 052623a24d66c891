"""Packaging of seppo_fast: which packages and files are installed, and with which requirements."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def version() -> str:
    """Returns `__version__` from seppo_fast/__init__.py, the only place that sets it, without importing the package."""
    text = (ROOT / "seppo_fast" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    assert found, "seppo_fast/__init__.py has no line that sets __version__"
    return found[1]


setup(
    name="seppo_fast",
    version=version(),
    description="SePPO for diffusion models: preference fine-tuning from winners alone, made fast",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # Listed by hand: `find_packages` would also install `kernels` at the top level, over HuggingFace's package.
    packages=[
        "seppo_fast",
        "seppo_fast.capacity",
        "seppo_fast.commands",
        "seppo_fast.config",
        "seppo_fast.config.recipes",
        "seppo_fast.data",
        "seppo_fast.data.cache",
        "seppo_fast.data.media",
        "seppo_fast.data.readers",
        "seppo_fast.diffusion",
        "seppo_fast.distributed",
        "seppo_fast.evaluation",
        "seppo_fast.evaluation.human",
        "seppo_fast.evaluation.media",
        "seppo_fast.evaluation.metrics",
        "seppo_fast.evaluation.real",
        "seppo_fast.evaluation.scoring",
        "seppo_fast.kernels",
        "seppo_fast.methods",
        "seppo_fast.methods.labelled",
        "seppo_fast.methods.losses",
        "seppo_fast.methods.replay",
        "seppo_fast.methods.reverse",
        "seppo_fast.methods.rewards",
        "seppo_fast.models",
        "seppo_fast.models.families",
        "seppo_fast.models.pipelines",
        "seppo_fast.references",
        "seppo_fast.runs",
        "seppo_fast.scorers",
        "seppo_fast.shapes",
        "seppo_fast.train",
        "seppo_fast.utils",
    ],
    package_dir={"seppo_fast.kernels": "kernels"},
    package_data={
        # The modules of seppo_fast.kernels come from kernels/, which must not have an __init__.py; they use this one.
        "seppo_fast": ["kernels/__init__.py"],
        "seppo_fast.config.recipes": ["*.yaml"],
        "seppo_fast.evaluation.human": ["page.js", "page.css"],
        "seppo_fast.shapes": ["made.safetensors", "pipeline/**", "motion_adapter/**", "motion_pipeline/**"],
    },
    install_requires=[
        "torch>=2.10",
        "triton>=3.6; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "accelerate>=1.15",
        "datasets>=4",
        "diffusers>=0.41",  # the newest for Python 3.10; 0.42 needs 3.11
        "matplotlib>=3.8",
        "numpy>=1.26",
        "peft>=0.21",
        "pillow>=10.1",
        "psutil>=5.9",
        "pydantic>=2.7",
        "pyyaml>=6",
        "safetensors>=0.8",
        "tqdm>=4.66",
        "transformers>=5.6",  # the embedded pipelines' text encoders use its names of weights
        "tyro>=1",
    ],
    extras_require={
        "video": ["av>=16"],
        "tensorboard": ["tensorboard>=2.18"],
        "wandb": ["wandb>=0.18"],
        "xformers": ["xformers>=0.0.35"],  # earlier versions each pin one torch version
        "scorers": ["ftfy>=6"],  # HPSv2's cleaning of prompts beyond plain ASCII
        "8bit": ["bitsandbytes>=0.49"],
        # setuptools: the packaging tests build a wheel without isolation.
        "test": [
            "av>=16",
            "ftfy>=6",
            "ipykernel>=7",
            "nbclient>=0.10",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "scikit-image>=0.24",
            "scipy>=1.13",
            "setuptools>=77",
            "tensorboard>=2.18",
        ],
        # Pinned to one minor version each: the next one may report new errors or format differently.
        "dev": ["mypy==2.4.*", "ruff==0.17.*", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["seppo-fast = seppo_fast.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
