"""Tells people what a load records, once a second: standard library only.

Reads the records of load.py, ws_load.py or udp_load.py from standard input, and says who answered
how many. Exits with 1 if one was lost.

    python3 -m example.load --port 8080 --seconds 5 | python3 -m example.tally
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from example.load import Request

if TYPE_CHECKING:
    from collections.abc import Iterable

PERIOD = 1.0  # seconds


def tell(lines: Iterable[str]) -> int:
    """Print what the records say, and return how many are failures."""
    total = lost = 0
    answered: Counter[str] = Counter()
    due = time.monotonic() + PERIOD
    for line in lines:
        request = Request(*json.loads(line))
        total += 1
        if request.error:
            lost += 1
            print(f"lost: {request.error}", flush=True)
        else:
            answered[request.instance] += 1
        if time.monotonic() >= due:
            who = ", ".join(f"{count} by {name}" for name, count in sorted(answered.items()))
            print(f"{total} sent, {lost} lost; last second: {who or 'no answers'}", flush=True)
            answered.clear()
            due = time.monotonic() + PERIOD
    print(f"{total} sent, {lost} lost")
    return lost


if __name__ == "__main__":
    sys.exit(1 if tell(sys.stdin) else 0)
