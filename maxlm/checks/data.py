"""Relations between the settings of `data`, and what a source may read like. Each problem is one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from maxlm.config import Config

SOURCES = ("stdlib", "text", "jsonl", "parquet", "tfds")
"""What the source of a store begins with."""


def source_problem(source: str) -> str:
    """What is wrong with the words of a source, whether its files are there or not; "" if nothing is."""
    word, colon, rest = source.partition(":")
    if word not in SOURCES:
        near = difflib.get_close_matches(word, SOURCES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"there is no source {word!r} (in {source!r}), only {', '.join(SOURCES)}{hint}"
    if (word == "stdlib") == bool(colon and rest):
        example = {"stdlib": "stdlib", "tfds": "tfds:NAME/SPLIT"}.get(word, f"{word}:GLOB")
        return f"the source {source!r} should read {example}"
    return ""


def check_data(config: Config) -> Iterator[str]:
    """The problems of `data`."""
    data = config.data
    if not data.stores:
        yield "data.stores is empty; name at least one, as in stores={'stdlib': StoreConfig(source='stdlib')}"
    for name, store in data.stores.items():
        if not store.source and not store.path:
            yield f"data.stores.{name} has neither a source nor a path; give one of them"
        if store.source and (problem := source_problem(store.source)):
            yield f"data.stores.{name}: {problem}"
        if store.heldout_permille > 1000:
            yield f"data.stores.{name}.heldout_permille is {store.heldout_permille}, but it has to be at most 1000"
    mixtures = [("data.mixture", data.mixture)]
    mixtures += [(f"data.phases.{name}.mixture", phase.mixture) for name, phase in data.phases.items()]
    for path, mixture in mixtures:
        for name, weight in mixture:
            if name not in data.stores:
                yield f"{path} names {name!r}, which is not in data.stores ({', '.join(data.stores) or 'empty'})"
            if [other for other, _ in mixture].count(name) > 1:
                yield f"{path} names {name!r} twice; give each store one weight"
            if weight < 0:
                yield f"{path} gives {name!r} the weight {weight}, but it has to be at least 0"
        if mixture and sum(weight for _, weight in mixture) <= 0:
            yield f"{path} has no weight above 0; give one store a positive weight"
    starts = [phase.from_step for phase in data.phases.values()]
    if len(set(starts)) < len(starts):
        yield f"data.phases begin at the steps {sorted(starts)}; no two may begin at the same"
    for name, phase in data.phases.items():
        if phase.from_step >= config.train.steps:
            yield f"data.phases.{name}.from_step is {phase.from_step}, but train.steps is {config.train.steps}"
    smallest = {"bytes": 257, "sentencepiece": 300}.get(data.tokenizer.kind, 2)
    if config.model.vocab_size < smallest:
        yield (
            f"model.vocab_size is {config.model.vocab_size}, but a {data.tokenizer.kind} tokenizer has at least "
            f"{smallest} pieces; use that or more"
        )
