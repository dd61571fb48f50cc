"""Do the intervals of the parametric fit hold the truth as often as they say?

python tools/study_coverage.py [--trials=200]

Runs of each published law are made up with 1% noise, fitted, and their 90% intervals held against the law they came
from. Ends with a non-zero exit code where an interval covers less than 84% or more than 96% of the trials, or where the
exponent of the best size is off by 0.02 in more than a tenth of them or by 0.05 in any.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from maxlm.study.law import REPLICATES, Law, bootstrap, fit_law
from maxlm.study.published import LAWS, synthetic

COVERED: dict[str, Callable[[Law], float]] = {
    "E": lambda law: law.E,
    "log A": lambda law: math.log(law.A),
    "log B": lambda law: math.log(law.B),
    "alpha": lambda law: law.alpha,
    "beta": lambda law: law.beta,
    "exponent": lambda law: law.exponent,
    "best loss at 1e24": lambda law: law.optimum(1e24).loss,
}


class Coverage(NamedTuple):
    """covered: trials whose interval held the truth, by figure. errors: of the exponent, (trials,)."""

    covered: dict[str, int]
    errors: np.ndarray


def coverage(name: str, *, trials: int, replicates: int = REPLICATES) -> Coverage:
    """The outcome of so many trials of a published law."""
    law = LAWS[name].law
    covered, errors = dict.fromkeys(COVERED, 0), []
    for seed in range(trials):
        points = synthetic(law, seed=seed)
        fit = fit_law(points)
        drawn = bootstrap(points, fit, seed=seed, replicates=replicates)
        errors.append(abs(fit.law.exponent - law.exponent))
        for figure, read in COVERED.items():
            covered[figure] += read(law) in drawn.interval(read)
    return Coverage(covered, np.array(errors))


def main() -> int:
    """Prints a line for each figure and law."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200)
    trials: int = parser.parse_args().trials
    failed = False
    for name in LAWS:
        began = time.monotonic()
        found = coverage(name, trials=trials)
        for figure, count in found.covered.items():
            bad = not 0.84 <= count / trials <= 0.96
            failed |= bad
            print(f"{name}: {figure} covered in {count / trials:.1%}{'  FAILED' if bad else ''}")
        bad = bool(np.mean(found.errors < 0.02) < 0.9 or found.errors.max() >= 0.05)
        failed |= bad
        print(
            f"{name}: exponent within 0.02 in {np.mean(found.errors < 0.02):.1%}, worst {found.errors.max():.4f}"
            f"{'  FAILED' if bad else ''} ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
