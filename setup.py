"""Package metadata. Build back end and tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "absl-py>=2.1",
    "array-record>=0.8",
    "av>=17",
    "einops>=0.8",
    "etils[epath]>=1.9",
    "flax>=0.12.8",
    "google-crc32c>=1.6",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "jaxtyping>=0.3",
    "librosa>=0.11",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pillow>=11.3",
    "rich>=13",
    "safetensors>=0.5",
    "scipy>=1.13",
    "soundfile>=0.12",
    "soxr>=0.5",
    "tensorboardX>=2.6.2",
    "tensorstore>=0.1.80",
    "tokenizers>=0.21",
    "zstandard>=0.22",
]

# espeakng-loader carries eSpeak NG, which is GPLv3: it stays an extra.
SAMPLE = ["espeakng-loader>=0.2.4", "scikit-learn>=1.5"]
SHOW = ["matplotlib>=3.9"]
HEIF = ["pillow-heif>=0.22"]
DEMO = ["gradio>=6.31,<7"]
SYNTHESIS = ["datasketch>=2.0", "espeakng-loader>=0.2.4", *SHOW]

EXTRAS = {
    "beam": ["apache-beam>=2.77"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "browser": [*DEMO, "selenium>=4.30"],  # tests of the page; they also need Debian's chromium and chromium-driver
    "cuda": ["jax[cuda12]>=0.10.2"],
    "demo": DEMO,
    "evaluate": ["pesq>=0.0.4", "pystoi>=0.4"],  # pesq is compiled when it is installed
    "heif": HEIF,
    "preflight": ["libtpu"],
    "parity": ["torch>=2.6", "transformers>=4.45"],
    "sample": SAMPLE,
    "show": SHOW,
    "synthesis": SYNTHESIS,
    "wandb": ["wandb>=0.19"],
    "seqio": ["seqio>=0.0.20"],
    "test": [
        "beartype>=0.20",
        "hypothesis>=6.100",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff==0.17.6",
        *HEIF,
        *SAMPLE,
        *SYNTHESIS,
    ],
}

setup(
    name="baichuan_omni_jax",
    version="0.1.0",
    description="Baichuan-Omni-1.5 in JAX/Flax for TPUs: trainable end to end",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["baichuan_omni_jax*", "data_pipelines*"]),
    package_data={"data_pipelines": ["**/*.json"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
