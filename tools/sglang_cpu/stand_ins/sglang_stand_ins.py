"""What stock SGLang imports and a CPU does not have. See README.md beside this file: why each, and how it gets here.

Python runs this at the start of every process of the environment, so it imports nothing heavy.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any, NoReturn

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")


class _ImportOnly(ModuleType):
    """A module in which every name exists: as a module, so that `import a.b.c` works, until `missing` knows better."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__file__ = __file__  # inspect.getmodule and torch read it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self.missing(name)
        setattr(self, name, value)
        return value

    def missing(self, name: str) -> Any:
        raise NotImplementedError


class _SglKernel(_ImportOnly):
    __version__ = "0.0.0"

    def missing(self, name: str) -> Any:
        if name == "scalar_types":  # an enumeration of number formats, read when the quantization layers are imported
            return _Names()

        def kernel(*_: Any, **__: Any) -> NoReturn:
            raise NotImplementedError(
                f"{self.__name__}.{name}: SGLang's compiled kernels are not part of this environment"
            )

        kernel.__name__ = name
        return kernel


class _Names:
    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Triton(_ImportOnly):
    __version__ = "3.0.0"

    def missing(self, name: str) -> Any:
        if name in _ARITHMETIC:
            return _ARITHMETIC[name]
        if name[0].isupper() or name == "constexpr":  # Config, KernelInterface, ...: constructed, subclassed, annotated
            return type(name, (_TritonObject,), {"__module__": self.__name__})
        return sys.modules.setdefault(f"{self.__name__}.{name}", _Triton(f"{self.__name__}.{name}"))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """@triton.jit, @triton.jit(...) and @triton.autotune(...): the function as it is. Launching it, with
        kernel[grid](...), fails: a function has no items."""
        if len(arguments) == 1 and callable(arguments[0]) and not options:
            return arguments[0]
        return lambda function: function


class _TritonObject:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __init_subclass__(cls, **_: Any) -> None:
        super().__init_subclass__()


_ARITHMETIC = {
    "cdiv": lambda a, b: -(a // -b),
    "next_power_of_2": lambda n: 1 << (n - 1).bit_length() if n > 0 else 1,
}
_PACKAGES = {"sgl_kernel": _SglKernel, "triton": _Triton}


class _Finder(MetaPathFinder, Loader):
    """Last in sys.meta_path: asked only for what nobody else has."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in _PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return sys.modules.get(spec.name) or _PACKAGES[spec.name.partition(".")[0]](spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Before(MetaPathFinder):
    """First in sys.meta_path: does what has to be done before a package is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in _BEFORE:
            _BEFORE.pop(name)()


def _declare_torchvision_operators() -> None:
    import torch

    if torch.version.cuda is None:  # otherwise torchvision brings its own
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # an operator lives as long as its library


def _fork_instead_of_spawn() -> None:
    """SGLang starts its processes anew because CUDA does not survive a fork. Here each import would be all they do for
    ten seconds, three times a server."""
    import multiprocessing

    set_start_method = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: set_start_method("fork", force)


_KEPT: list[Any] = []
_BEFORE = {"torchvision": _declare_torchvision_operators, "sglang": _fork_instead_of_spawn}
sys.meta_path.insert(0, _Before())
sys.meta_path.append(_Finder())
