#!/usr/bin/env bash
# Make a virtual environment with stock SGLang that serves on a CPU: tools/sglang_cpu.sh [VENV]
# For tests and for trying things out; the servers of a real run have GPUs and an SGLang of their own. PYTHON names the
# interpreter (default python3). Done already (same files here): nothing happens.
#
#   bash tools/sglang_cpu.sh
#   python tools/sglang_worker.py --model tiny --num-workers 2
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${1:-.venv-sglang}
files=tools/sglang_cpu

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.11 | 3.12 | 3.13) ;;
    *)
        echo "error: $python is Python $version; SGLang needs 3.11, 3.12 or 3.13 here: PYTHON=... tools/sglang_cpu.sh" >&2
        exit 1
        ;;
esac

state=$(cat "$files/requirements.txt" "$files"/stand_ins/*.p* "$files.sh" | cksum)
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/sglang_cpu.installed" 2>/dev/null)" = "$state" ]; then
    echo "$venv has it already"
    exit 0
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
log=$venv/install.log
echo "installing torch and $(grep '^sglang==' "$files/requirements.txt") into $venv: a minute or three, 1.8 GB (a log is in $log)"
if ! { "$venv/bin/pip" install torch==2.13.0 && "$venv/bin/pip" install --no-deps -r "$files/requirements.txt"; } >"$log" 2>&1; then
    grep -E '^ *error|Error' "$log" | tail -n 15 >&2 || tail -n 15 "$log" >&2
    echo "error: the installation failed; the whole log is in $log" >&2
    exit 1
fi
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "copying the import stand-ins of $files/stand_ins"
cp "$files"/stand_ins/sglang_stand_ins.p* "$site/"
"$venv/bin/python" -c 'import sglang.srt.server_args' >>"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    echo "error: SGLang does not import in $venv; the whole log is in $log" >&2
    exit 1
}
echo "$state" >"$venv/sglang_cpu.installed"
echo "$venv/bin/python runs SGLang: python tools/sglang_worker.py --help"
