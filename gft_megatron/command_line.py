"""The command line and the configuration file: both become a `RunConfig`, or one line that says what is wrong.

`--config FILE` reads a YAML file of `name: value` lines first (as `save_config` writes it); flags override it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from gft_megatron.config import RunConfig
from gft_megatron.config_checks import flag_of
from gft_megatron.losses import loss_hyper_parameters

Settings = TypeVar("Settings")


def parse_args(argv: Sequence[str] | None = None) -> RunConfig:
    """Read the command line.

    Raises:
        ValueError: in one line, what was wrong with which flag.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    file_values, argv = _read_config_file(argv)
    # A file's values become flags in front of the real ones, so that both meet the same checks.
    return _parse_run([*_as_flags(file_values), *argv])


def parse_values(values: dict[str, Any]) -> RunConfig:
    """A configuration from `name: value`, as a file of --config holds them.

    Raises:
        ValueError: in one line, what was wrong with which flag.
    """
    return _parse_run(_as_flags(values))


def flat_values(config: RunConfig) -> dict[str, Any]:
    """The settings as `name: value`."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for section in dataclasses.asdict(config).values()
        for key, value in section.items()
    }


def _parse_run(argv: Sequence[str]) -> RunConfig:
    return parse_flags(
        RunConfig, argv, config=(tyro.conf.OmitArgPrefixes,), description="Group Fine-Tuning on Megatron-Core."
    )


def parse_flags(settings_type: type[Settings], argv: Sequence[str] | None = None, **tyro_options: Any) -> Settings:
    """tyro.cli without its box around an error.

    Raises:
        ValueError: in one line, what was wrong with which flag.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(settings_type, args=argv, **tyro_options)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise ValueError(_first_sentence(complaint.getvalue(), settings_type.__name__)) from None


def parse_command(commands: Mapping[str, type[Settings]], *, word: str, prog: str, description: str) -> Settings:
    """The settings of a program whose first argument picks them; without one, its description and the end.

    Args:
        commands: by name.
        word: what the description calls a name, METHOD for one.

    Raises:
        ValueError: as `parse_flags`; there is no such name.
        SystemExit: the description was asked for.
    """
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(description.strip())
        raise SystemExit(0)
    if name not in commands:
        raise ValueError(f"{word} is {name!r}; it has to be one of {', '.join(commands)}")
    return parse_flags(commands[name], flags, prog=f"{prog} {name}")


def _read_config_file(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    if "--config" not in argv:
        return {}, argv
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise ValueError("--config needs a file name")
    path = Path(argv[at + 1])
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected `name: value` lines, got {type(values).__name__}")
    return values, argv[:at] + argv[at + 2 :]


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    hyper = {key for parameters in loss_hyper_parameters().values() for key in parameters}
    for name, value in values.items():
        flag = flag_of(str(name))
        if value is None:
            continue
        # A loss's own switch can also be unset, so its flag takes a word: --per-sample True.
        if isinstance(value, bool) and name not in hyper:
            flags.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, str(value)]
    return flags


def _first_sentence(boxed: str, settings_name: str) -> str:
    """tyro explains an error in a box, first what is wrong, then a rule, then help: keep what is wrong."""
    words: list[str] = []
    for line in boxed.splitlines():
        text = line.strip("\u2502 ").strip()
        if text.startswith(("\u256d", "\u2570")):
            continue
        if text.startswith("\u2500"):
            break
        words += text.split()
    return " ".join(words).removeprefix(f"Error parsing {settings_name}: ")


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings as a file that --config reads."""
    path.write_text(yaml.safe_dump(flat_values(config), sort_keys=False))
