"""The servers' two keys: generated, or taken from the environment; never on a command line, in a log or a run folder.

Whoever has the first has in effect both: SGLang lists its own keys in /server_info, which asks for the first only
(0.5.23). Give neither to anybody who may not change the weights.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path

from gft_megatron.rollout.sglang.http import Keys

API_KEY_VARIABLE = "GFT_SGLANG_API_KEY"
ADMIN_KEY_VARIABLE = "GFT_SGLANG_ADMIN_KEY"

# Long enough; nothing in it that a log may write in another way, where it would not be found to be taken out; and no
# hyphen at its beginning, which SGLang would take for a flag.
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.~-]{15,255}")
_ALLOWED = "16 to 256 letters, digits or any of _ . ~ - (openssl rand -hex 32)"


def generate_keys() -> Keys:
    """Two new ones."""
    return Keys(api=secrets.token_hex(32), admin=secrets.token_hex(32))


def read_keys(environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys that GFT_SGLANG_API_KEY and GFT_SGLANG_ADMIN_KEY give; a variable that is not set or empty gives none.

    Raises:
        ValueError: a key that is too short, or with other characters than those.
    """
    for variable in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE):
        key = environment.get(variable)
        if key and not _KEY.fullmatch(key):
            raise ValueError(f"{variable} holds {len(key)} characters, but not those of a key: {_ALLOWED}")
    return Keys(api=environment.get(API_KEY_VARIABLE) or None, admin=environment.get(ADMIN_KEY_VARIABLE) or None)


def keys_for_launch(environment: Mapping[str, str] = os.environ) -> Keys:
    """Both keys for servers that we start: those of the environment, or new ones.

    Raises:
        ValueError: the environment gives one of the two.
    """
    keys = read_keys(environment)
    if keys.api is None and keys.admin is None:
        return generate_keys()
    if keys.api is None or keys.admin is None:
        missing = API_KEY_VARIABLE if keys.api is None else ADMIN_KEY_VARIABLE
        raise ValueError(f"{missing} is not set: give both keys, or neither to have new ones")
    return keys


def key_variables(keys: Keys) -> dict[str, str]:
    """The environment that gives these keys to another process."""
    given = {API_KEY_VARIABLE: keys.api, ADMIN_KEY_VARIABLE: keys.admin}
    return {variable: key for variable, key in given.items() if key is not None}


def write_keys(path: Path, keys: Keys) -> None:
    """A file that a shell can source, readable by its owner only."""
    lines = [f"export {variable}={shlex.quote(key)}\n" for variable, key in key_variables(keys).items()]
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.writelines(lines)
    temporary.replace(path)


def refuse_open_server(host: str, keys: Keys) -> None:
    """A server without keys does what anybody says who reaches it: it is for this machine only.

    Raises:
        ValueError: such a server on any other address.
    """
    if keys.api is not None and keys.admin is not None or is_loopback(host):
        return
    raise ValueError(
        f"a server without both keys may not listen on {host}: anybody who reaches it could change its weights. Set "
        f"{API_KEY_VARIABLE} and {ADMIN_KEY_VARIABLE}, or listen on 127.0.0.1"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
