"""What looks after a running run: each of them sees one kind of fault (docs/faults.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from maxlm.data.proof import Proof
from maxlm.train.audit import Audit
from maxlm.train.rollback import Refusals, refusals
from maxlm.train.setup import Setup
from maxlm.train.state import TrainState
from maxlm.train.watchdog import Watchdog


@dataclasses.dataclass
class Sentries:
    """watchdog: steps that do not end. refusals: too many updates refused. audit: devices that compute wrongly.
    proof: damaged stores."""

    watchdog: Watchdog
    refusals: Refusals
    audit: Audit
    proof: Proof

    @classmethod
    def post(
        cls,
        setup: Setup,
        watchdog: Watchdog,
        proof: Proof,
        *,
        state: TrainState,
        metadata: Mapping[str, Any],
        log: Callable[[str], None],
    ) -> Sentries:
        """Those of a run that begins with `state`, which came with `metadata`."""
        return cls(
            watchdog,
            refusals(setup.config.optim.guard.rollback, state, metadata),
            Audit(setup, log=log),
            proof,
        )
