"""The process that runs math-verify: one JSON request a line on stdin, one JSON reply a line on stdout.

    {"expected": latex, "readings": [text, ...], "limit_sec": n} -> {"equal": bool} or {"error": reason}

Run as a file, not as a module of the package, which would import torch. It ends when stdin does.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

from math_verify import parse, verify


def are_equal(expected: str, reading: str) -> bool:
    """Whether this reading of an answer equals the expected one.

    What math-verify cannot parse or compare is not equal; running out of memory or stack is no verdict.
    """
    try:
        gold = parse(expected, parsing_timeout=None, raise_on_error=True)
        answer = parse(reading, parsing_timeout=None, raise_on_error=True)
        return verify(gold, answer, timeout_seconds=None, raise_on_error=True)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return False


def main() -> None:
    max_address_space = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (max_address_space, max_address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    # The replies keep the real stdout; whatever a library prints must not get between them.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    are_equal("\\boxed{\\frac{1}{2}}", "\\boxed{0.5}")  # loads the parser before the first clock runs
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # The parent kills at its limit. This ends the process where the parent is gone: the default action of SIGALRM
        # does not wait for Python.
        signal.alarm(request["limit_sec"])
        try:
            reply = {"equal": any(are_equal(request["expected"], reading) for reading in request["readings"])}
        except RecursionError:
            reply = {"error": "the answer is nested too deep"}
        signal.alarm(0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
