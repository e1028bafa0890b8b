"""Builds gft_megatron._C and writes down the torch it belongs to. Everything static is in pyproject.toml.

GFT_MEGATRON_CUDA=1|0 forces the CUDA operators in or out; unset, they are built where nvcc and a CUDA torch are found.
TORCH_CUDA_ARCH_LIST chooses the GPU architectures (unset: 8.0, 9.0 and, from CUDA 12.8 on, 10.0; PTX of the last).
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

OLDEST_TORCH = (2, 11)
DEPENDENCIES = [
    "megatron-core==0.16.1 ; python_version<'3.12'",
    "megatron-core>=0.19,<0.20 ; python_version>='3.12'",
    "psutil",  # megatron.core.dist_checkpointing hangs without it
    "numpy",
    "transformers>=5.20,<6",
    "safetensors",
    "aiohttp",  # the SGLang servers' client
    "math-verify",
    "pyarrow",
    "tyro",
    "rich",
    "tensorboard",
    "matplotlib",
    "pyyaml",
    "jinja2",  # the chat templates of transformers
]


def find_cuda_home() -> str | None:
    """The toolkit's folder. torch takes the one above `nvcc`, wrongly where nvcc is a link or a wrapper script."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parents[1]), "/usr/local/cuda"]
    return next((home for home in candidates if home and Path(home, "nvvm").is_dir()), None)


def use_cuda(torch_cuda: str | None, cuda_home: str | None) -> bool:
    wish = os.environ.get("GFT_MEGATRON_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"GFT_MEGATRON_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "1" and torch_cuda is None:
        raise SystemExit("GFT_MEGATRON_CUDA=1, but the torch of this environment is a CPU build; install a CUDA torch")
    if wish == "1" and cuda_home is None:
        raise SystemExit("GFT_MEGATRON_CUDA=1, but there is no nvcc; install the CUDA toolkit or set CUDA_HOME")
    return wish != "0" and torch_cuda is not None and cuda_home is not None


def gpu_architectures(torch_cuda: str | None) -> str:
    """An nvcc before 12.8 stops at the name of an architecture that it does not know."""
    knows_blackwell = torch_cuda is not None and tuple(map(int, torch_cuda.split(".")[:2])) >= (12, 8)
    return "8.0;9.0;10.0+PTX" if knows_blackwell else "8.0;9.0+PTX"


def require_cxx() -> None:
    """Point CXX at a compiler that exists: a relocated Python remembers the one of the machine it was built on."""
    candidates = (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++")
    found = next((cxx for cxx in candidates if cxx and shutil.which(cxx.split()[0])), None)
    if found is None:
        raise SystemExit("gft_megatron: no C++ compiler found; install g++ (11 or newer) or set CXX")
    os.environ["CXX"] = found


def extension_arguments() -> dict:
    """setup() arguments that need torch; without one (only an sdist may be made then) there is nothing to build."""
    cuda_home = find_cuda_home()
    if cuda_home is not None:
        os.environ["CUDA_HOME"] = cuda_home
    try:
        import torch
    except ImportError:
        return {"install_requires": ["torch>=2.11", *DEPENDENCIES]}
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise SystemExit(f"gft_megatron needs torch 2.11 or newer; this environment has {torch.__version__}")
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            require_cxx()
            super().build_extensions()

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", gpu_architectures(torch.version.cuda))
    with_cuda = use_cuda(torch.version.cuda, cuda_home)
    # Without -fopenmp at::parallel_for is silently serial. No -ffast-math: infinities and NaN have a meaning here.
    cxx_flags = ["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    cxx_flags.append(f"-DGFT_MEGATRON_TORCH_VERSION={torch.__version__}")
    compile_flags = {"cxx": cxx_flags, "nvcc": ["-O3"]}
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    extension_type = cpp_extension.CppExtension
    if with_cuda:
        cxx_flags.append("-DGFT_MEGATRON_WITH_CUDA")
        sources += sorted(glob("csrc/cuda/*.cu"))
        extension_type = cpp_extension.CUDAExtension
    extension = extension_type(
        "gft_megatron._C",
        sources,
        include_dirs=[os.path.abspath("csrc")],
        depends=sorted(glob("csrc/**/*.*", recursive=True)),
        extra_compile_args=compile_flags,
        extra_link_args=["-fopenmp"],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "install_requires": [f"torch=={torch.__version__.split('+')[0]}", *DEPENDENCIES],
    }


setup(**extension_arguments())
