"""Reading every byte of the stores beside the training: a damaged token changes a run without a word."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from maxlm.data.store import StoreError, TokenStore
from maxlm.data.workers import note
from maxlm.storage import StorageError

HEAD_START = 10.0  # seconds that a run waits before its first step: small stores are proved by then


class Proof:
    """Holds the stores against their manifests, on a thread that begins at once.

    Opening a store looks at sizes alone, since reading a large one takes hours (a gigabyte takes about a second).
    """

    def __init__(self, stores: Mapping[str, TokenStore]):
        self._stores, self._problem = list(stores.values()), ""
        self._thread = threading.Thread(target=self._read, daemon=True, name="proof")
        self._thread.start()

    def check(self, wait: float = 0.0) -> None:
        """Raises StoreError if a damaged file was found so far; waits for the end of the reading, so many seconds."""
        self._thread.join(wait)
        if self._problem:
            raise StoreError(
                f"{self._problem}. Put back a copy or make the store anew; checkpoints that were saved since this "
                "start may have seen damaged tokens"
            )

    def _read(self) -> None:
        for store in self._stores:
            try:
                store.verify()
            except StorageError as error:  # a bucket that does not answer, or a cache without room, is no damage
                note(f"{store.place} was not read in full: {error}. Each file is compared with its hash before its use")
            except (StoreError, OSError) as error:
                self._problem = str(error)
                return
