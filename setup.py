"""Metadata of the `apet` distribution: the packages `apet` and `llava`, and what they need."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read(name: str) -> str:
    """The text of a file beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


VERSION = re.search(r'^__version__ = "([^"]+)"', read("apet/__init__.py"), re.MULTILINE).group(1)

SAMPLE = ["scikit-learn>=1.4", "scikit-image>=0.22", "matplotlib>=3.8"]
MMBENCH = ["pandas>=2.1", "openpyxl>=3.1"]
# To convert the two wheels of examples/sample_vlm/real; the lower bounds are what it was run with.
REAL = ["onnx>=1.23", "onnxruntime>=1.32", "gguf>=0.19", *SAMPLE]
# The formatter's output changes between releases, so ruff is the one pinned tool.
TEST = ["pytest>=8.0", "hypothesis>=6.100", "ruff==0.17.5", *SAMPLE, *MMBENCH]

setup(
    name="apet",
    version=VERSION,
    description="Approximation-error guided compression of visual tokens for vision-language models",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["apet", "apet.*", "llava", "llava.*"]),
    package_data={"apet": ["py.typed"], "llava": ["py.typed"]},
    install_requires=read("requirements.txt").split(),
    extras_require={
        "test": TEST,
        "sample": SAMPLE,
        "real": REAL,
        "mmbench": MMBENCH,
        "quant": ["bitsandbytes>=0.45"],
        "flash": ["flash-attn>=2.6"],
        "vllm": ["vllm>=0.32,<0.33"],
    },
    entry_points={
        "lmms_eval.models": ["apet = apet.harness:lmms_eval_manifests"],
        "vllm.general_plugins": ["apet = apet.serving.plugin:register"],
        "vllm.endpoint_plugins": ["apet = apet.serving.route:SettingsRoute"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
