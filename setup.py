from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="ddt-fast",
    version="0.1.0",
    description="Fast training, sampling and scoring of DDT, the Decoupled Diffusion Transformer",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["ddt_fast*"]) + find_packages("kernels"),
    package_dir={"ddt_kernels": "kernels/ddt_kernels"},
    package_data={"ddt_fast": ["py.typed", "assets/*/*"], "ddt_kernels": ["py.typed"]},
    # Wide enough to replace nobody's torch; README and CI pin the set that every commit is tested with.
    python_requires=">=3.11,<3.15",
    install_requires=[
        "torch>=2.11,<2.15",
        "triton>=3.6,<3.9; platform_system == 'Linux'",
        "numpy>=2.0",
        "diffusers>=0.36,<1",
        "huggingface_hub>=1.0",
        "jsonargparse[signatures]>=4.49,<5",
        "matplotlib>=3.9",
        "pillow>=10.1",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.6", "hypothesis>=6.100", "transformers>=5,<6"],
        "repa": ["transformers>=5,<6"],
        "gpu": ["flash-attn>=2.8", "xformers>=0.0.35"],
        "demo": ["gradio>=6,<7"],
        "logging": ["tensorboard>=2.19", "wandb>=0.31"],
    },
)
