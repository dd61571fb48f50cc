"""The weights that a run begins with, where they are given (`train.init_from`), and what is written down of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from maxlm.checkpoint.digest import array_paths
from maxlm.checkpoint.reader import digest_each
from maxlm.cluster import agree_on
from maxlm.config import Config
from maxlm.convert.folder import carry
from maxlm.convert.stored import CARRIED, carried_files, vocabulary
from maxlm.convert.weights import open_weights
from maxlm.data.prepare import Prepared
from maxlm.errors import UserError
from maxlm.train.home import WEIGHTS, Home, copied
from maxlm.train.setup import Setup

Log = Callable[[str], None]


class First(NamedTuple):
    """params: what the run begins with, on its mesh; None: they are drawn. vocab_size: rows that are not padding."""

    params: dict[str, Any] | None
    vocab_size: int


def first_weights(config: Config, setup: Setup, workdir: Path, data: Prepared, *, log: Log) -> First:
    """The parameters that the run begins with.

    Of a vocabulary that was made longer, the rows that no token of the tokenizer has are padding. The config.json,
    tokenizer and templates that belong to the weights are copied into the workdir, for generation and export.

    Raises:
      UserError: on every process, if one of them does not find them there.
    """
    if not config.train.init_from:
        return First(None, config.model.vocab_size)
    found: str | UserError
    try:
        source = copied(config.train.init_from, log=log)
        place = open_weights(source, config.model, log=log)
        found = source.name  # of a bucket's it tells the checkpoint: a run there may go on meanwhile
    except UserError as error:
        found = error
    agree_on("train.init_from", found)
    params = place(setup.shardings.params)
    belonging = carried_files(source)
    if belonging and jax.process_index() == 0:
        carry(belonging, workdir / CARRIED)
    log(f"beginning with the weights of {source}")
    used = max(vocabulary(source), data.tokenizer.vocab_size)
    return First(params, min(used, config.model.vocab_size))


def settle_weights(home: Home, params: dict[str, Any], source: str, *, log: Log) -> None:
    """Writes down which weights the run begins with, and says so if it began with others before it was killed."""
    found, before = weights_digest(params), home.facts().get(WEIGHTS)
    if before not in (None, found):
        log(f"the run was begun before, with other weights: {source} has changed since; it begins anew with these")
    with contextlib.suppress(OSError):  # a full disk; a replay then says that nothing was written down
        home.note(WEIGHTS, found)


def other_weights(home: Home, params: Mapping[str, Any], source: str) -> str:
    """How the weights that `source` holds now differ from those that the run began with, in words; "": they do not."""
    began = home.facts().get(WEIGHTS)
    if began is None:
        return f"the run did not write down which weights of {source} it began with"
    return "" if began == weights_digest(params) else f"the run began with other weights than {source} holds now"


def weights_digest(params: Mapping[str, Any]) -> str:
    """A digest of all parameters (nested dict) in hex digits, the same on any mesh. All processes call it."""
    found = jax.device_get(digest_each(array_paths(params)))
    words = sorted((path, value.tolist()) for path, value in found.items())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
