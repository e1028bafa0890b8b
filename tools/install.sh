#!/usr/bin/env bash
# Make a virtual environment with this project in it, compiled: tools/install.sh [PYTHON] [VENV]
# Done already (same sources, same lock file): nothing happens.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
venv=${2:-.venv}

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.11) lock=constraints/py311-cpu.txt ;;
    3.12 | 3.13) lock=constraints/py312.txt ;;
    *)
        echo "error: $python is Python $version; gft_megatron needs 3.11, 3.12 or 3.13: tools/install.sh PYTHON" >&2
        exit 1
        ;;
esac

state=$(cat "$lock" pyproject.toml setup.py _build/*.py csrc/*.* csrc/*/* | cksum)
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/gft_megatron.installed" 2>/dev/null)" = "$PWD $state" ]; then
    exit 0
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
log=$venv/install.log
echo "installing into $venv (a log is in $log)"
# torch first: the build backend then compiles against it instead of fetching one of its own.
if ! { "$venv/bin/pip" install -c "$lock" torch && "$venv/bin/pip" install -c "$lock" -e '.[test]'; } >"$log" 2>&1; then
    grep -E '^ *error|Error|gft_megatron:' "$log" | tail -n 15 >&2 || tail -n 15 "$log" >&2
    echo "error: the installation failed; the whole log is in $log" >&2
    exit 1
fi
echo "$PWD $state" >"$venv/gft_megatron.installed"
