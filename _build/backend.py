"""PEP 517 backend: setuptools, building against the torch of the environment that is being installed into.

pip builds in an empty environment of its own. A torch fetched into that one is gigabytes, may differ from the torch
that later imports the extension, and cannot be fetched at all on a machine without a network. So: where the target
environment already has a supported torch, it is made importable here and nothing is requested; else one is requested.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import site
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

OLDEST_TORCH = (2, 11)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _site_packages() -> list[str]:
    """Package folders of the target environment. pip hides them from sys.path, but sys.prefix is still the target's."""
    prefixes = [sys.prefix]
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.is_file() and "include-system-site-packages = true" in config.read_text().lower():
        prefixes.append(sys.base_prefix)
    return site.getsitepackages(prefixes)


def _find_torch() -> str | None:
    """The package folder of the target environment that holds a supported torch."""
    for folder in _site_packages():
        for torch in importlib.metadata.distributions(name="torch", path=[folder]):
            major, minor = torch.version.split(".")[:2]
            return folder if (int(major), int(minor)) >= OLDEST_TORCH else None
    return None


def _required_torch() -> list[str]:
    if importlib.util.find_spec("torch") is not None or _find_torch() is not None:
        return []
    # Python 3.11 ends with megatron-core 0.16.1, so it stays with the torch that this pair is tested with.
    return ["torch==2.13.0"] if sys.version_info < (3, 12) else [f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"]


def _make_torch_importable() -> None:
    if importlib.util.find_spec("torch") is None:
        folder = _find_torch()
        if folder is None:
            raise SystemExit("gft_megatron: no torch >= 2.11 to build against; install one, or build with isolation")
        sys.path.append(folder)  # last: the build environment's own setuptools stays the one in use


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return _required_torch()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return _required_torch()


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None) -> str:
    _make_torch_importable()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None) -> str:
    _make_torch_importable()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    _make_torch_importable()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    _make_torch_importable()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
