"""Words that several checks use."""

from __future__ import annotations


def divisors(number: int, limit: int = 12) -> str:
    """The divisors of a number, for a message; the first `limit`."""
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return ", ".join(found[:limit]) + (", …" if len(found) > limit else "")
