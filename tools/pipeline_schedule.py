#!/usr/bin/env python3
"""Draws a pipeline schedule's table, with its makespan, bubble and held microbatches.

python tools/pipeline_schedule.py --schedule=zero_bubble --stages=4 --microbatches=8
"""

from __future__ import annotations

import argparse
import sys

from maxlm.parallel.pipeline.schedule import NAMES, ScheduleError, build, draw


def main() -> int:
    """Draws what there is to draw; 1 if that is not what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", choices=NAMES, help="one schedule; all of them if it is left out")
    parser.add_argument("--stages", type=int, default=4, help="devices along parallel.pipeline")
    parser.add_argument("--microbatches", type=int, default=8, help="train.accumulation")
    parser.add_argument("--virtual", type=int, default=2, help="parallel.virtual_stages of interleaved")
    given = parser.parse_args()
    drawn = []
    for name in [given.schedule] if given.schedule else NAMES:
        virtual = given.virtual if name == "interleaved" else 1
        try:
            print(draw(build(name, stages=given.stages, microbatches=given.microbatches, virtual=virtual)))
            drawn.append(name)
        except ScheduleError as error:
            # Of all schedules the others are still of use.
            print(f"error: {error}", file=sys.stderr if given.schedule else sys.stdout)
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
