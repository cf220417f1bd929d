"""Matches names with a stranger's regular expression, in a process of its own (`adapter_config.matching`). Python's `re` bounds neither the
time nor the memory of a match. Here the operating system bounds both: an expression that exceeds a limit ends this process only.

Standard input: JSON of [expression, names]. Standard output: JSON of the numbers of the names that match whole, or of a reason.

This file imports nothing of gp_jax, because the import would take longer than matching.
"""

import json
import re
import resource
import sys

SECONDS = 1  # of CPU time, start included; usual expressions take 0.05
MEMORY = 160 << 20  # bytes of the process


def main() -> None:
    """Answers one request."""
    for limit, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    expression, names = json.load(sys.stdin)
    try:
        pattern = re.compile(expression)
        found = [number for number, name in enumerate(names) if pattern.fullmatch(name)]
        print(json.dumps({"found": found}))
    except (re.error, RecursionError, OverflowError) as error:
        print(json.dumps({"reason": str(error)[:200]}))


if __name__ == "__main__":
    main()
