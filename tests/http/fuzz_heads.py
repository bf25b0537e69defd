"""Give the scanner of ordinary heads millions of changed ones: ``make fuzz-heads``.

What it takes, h11 gets too, and all that the scanner said and wrote of it has to be the same. Of
some of the others its twin has to say the same; hypothesis looks for such differences, too.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from multiprocessing import Pool
from typing import NamedTuple

from kamal_proxy._fastpath import rewrite_response
from tests.http.head_edits import edited
from tests.http.head_samples import (
    ODD_REQUESTS,
    ODD_RESPONSES,
    ORDINARY_REQUESTS,
    ORDINARY_RESPONSES,
)
from tests.http.slow_heads import (
    ALT_SVC,
    Given,
    compare_request,
    compare_response,
    ordinary_request,
)
from tests.reference.ordinary import is_ordinary_request, is_ordinary_response

METHODS = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS"]
PART = 50_000  # heads that one seed makes
TWIN_EVERY = 16
# What is not ordinary seldom becomes so by a change.
ORDINARY_SHARE = 7 / 8

_REQUESTS = list(ORDINARY_REQUESTS.values()), list(ODD_REQUESTS.values())
_RESPONSES = list(ORDINARY_RESPONSES.values()), list(ODD_RESPONSES.values())


class Tally(NamedTuple):
    """How many heads were tried, and how many of them were ordinary: h11 said the same of these."""

    tried: int
    ordinary: int


class Differs(Exception):
    """Something is read or written otherwise."""


def try_heads(seed: int, count: int) -> Tally:
    """Try so many heads, half of them of requests; the same ones with the same seed.

    Raises:
        Differs: with the head that the scanner and its twin, or h11, do not agree on.
    """
    random_ = random.Random(seed)
    ordinary = 0
    for number in range(count):
        is_request = number % 2 == 0
        if is_request:
            data, method = random_.choice(_REQUESTS[random_.random() > ORDINARY_SHARE]), b""
        else:
            method, data = random_.choice(_RESPONSES[random_.random() > ORDINARY_SHARE])
        bits = random_.getrandbits(160)
        for shift in range(0, 48 + 48 * (bits % 3), 48):
            data = edited(data, bits >> shift + 2, bits >> shift + 12 & 0xFFFF, bits >> shift + 28)
        check = _check_request if is_request else _check_response
        try:
            ordinary += check(data, method, bits >> 150, number % (2 * TWIN_EVERY) < 2)
        except Exception as error:
            raise Differs(f"seed {seed}, head {number}, {method!r}: {data!r}") from error
    return Tally(count, ordinary)


def _check_request(data: bytes, method: bytes, bits: int, with_twin: bool) -> bool:
    if with_twin:
        assert (ordinary_request(data) is not None) == is_ordinary_request(data)
    prefix = bits >> 2 if bits & 2 else 0
    return compare_request(data, Given(believed=bool(bits & 1), prefix=prefix))


def _check_response(data: bytes, method: bytes, bits: int, with_twin: bool) -> bool:
    if bits & 12 == 0:
        method = METHODS[(bits >> 4) % len(METHODS)]
    if with_twin:
        is_taken = rewrite_response(data, method) is not None
        assert is_taken == is_ordinary_response(data, method)
    added = (ALT_SVC,) if bits & 1 else ()
    return compare_response(data, method, Given(closes=bool(bits & 2), added=added))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=5_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=time.time_ns() >> 20)
    options = parser.parse_args()
    parts = -(-options.heads // PART)
    print(f"seeds {options.seed} to {options.seed + parts - 1}")
    began = time.perf_counter()
    tried = ordinary = 0
    with Pool(options.processes) as pool:
        seeds = range(options.seed, options.seed + parts)
        for tally in pool.starmap(try_heads, zip(seeds, itertools.repeat(PART)), chunksize=1):
            tried += tally.tried
            ordinary += tally.ordinary
    seconds = time.perf_counter() - began
    print(
        f"{tried} heads in {seconds:.0f} s, {tried / seconds:.0f} a second; "
        f"{ordinary} were ordinary, and h11 said the same of them"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
