"""From a config's sources to its tokenizer and token stores: parallel, resumable, committed by one rename.

A store is built in `OUT.partial`: units of the source are tokenised by worker processes into runs, the runs are merged
into a store there, and that is renamed to `OUT`. After a kill, the same call goes on with the units that are done.
The store's content depends on the documents, the tokenizer and the split rule only: not on file names, the number of
processes or kills. One that is wanted in a bucket is built on this machine and copied there, its manifest last.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import Config, DataConfig, StoreConfig
from maxlm.data import pieces, tokenizers
from maxlm.data.sources import Listing, SourceError, list_source
from maxlm.data.staging import fetch_or_none, has_store, keep_as_copies, publish
from maxlm.data.store import FORMAT, SPLITS, StoreError, StoreWriter, TokenStore
from maxlm.data.tokenizers import Tokenizer, TokenizerError, load_tokenizer
from maxlm.data.workers import Progress, WorkerPool, note, worker_count
from maxlm.files import locked, write_among_others
from maxlm.storage import Folder, cache_folder, is_bucket, local_name


class StoreReport(NamedTuple):
    """What preparing a store took. `text_bytes` are those of its documents, `seconds` the wall time of this call."""

    path: str
    fingerprint: str
    reused: bool
    seconds: float
    text_bytes: int
    tokens: int
    documents: int
    skipped: dict[str, int]
    megabytes_per_second: float  # of text that this call tokenised; 0.0 where there was nothing left to do


class PreparedStore(NamedTuple):
    """A store that is ready, and how it got so."""

    store: TokenStore
    report: StoreReport


class Prepared(NamedTuple):
    """All that a run reads."""

    tokenizer: Tokenizer
    stores: dict[str, TokenStore]
    reports: dict[str, StoreReport]

    def fingerprint(self) -> str:
        """A short digest of all that the run reads: the tokenizer's and the stores' fingerprints."""
        parts = [self.tokenizer.fingerprint, *(f"{name}={store.fingerprint}" for name, store in self.stores.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def prepare_data(config: Config, workdir: Path, *, build: bool = True, home: str | Path = "") -> Prepared:
    """Makes, or finds made, the tokenizer and the stores of a run.

    What has no path of its own is made in `data.cache_dir` (or the workdir's `data/`) under a name of its content, and
    used again while the sources' names, sizes and times stay as they are. `workdir/data/prepared.json` says where
    everything is.

    Args:
      config: The run.
      workdir: The run's folder.
      build: Whether this process may build. Of several processes one does; the others call with False once it
        is done, and read prepared.json alone.
      home: Where the run lives if that is a bucket; `workdir` then is its folder on this machine.

    Raises:
      SourceError, TokenizerError, StoreError: What is asked for cannot be had, in one sentence.
    """
    record = workdir / "data" / "prepared.json"
    if not build:
        return _open_prepared(config, record)
    data = config.data
    folder = _cache(config, home or workdir)
    listings = _list_sources(data)
    tokenizer = _resolve_tokenizer(config, listings, folder)
    stores, reports = {}, {}
    for name, entry in data.stores.items():
        if not entry.source:
            stores[name] = _open_given(name, entry, tokenizer)
            continue
        listing = listings[name]
        identity = _digest(FORMAT, listing.fingerprint, tokenizer.fingerprint, entry.heldout_permille)
        out = entry.path or f"{folder}/{name}-{identity[:12]}"
        stores[name], reports[name] = prepare_store(entry, tokenizer, out, workers=data.workers, listing=listing)
    places = {name: _noted(store.place, record.parent) for name, store in stores.items()}
    write_among_others(record, json.dumps({"key": _config_key(config), "stores": places}, indent=1))
    return Prepared(tokenizer, stores, reports)


def prepare_tokenizer(config: Config, home: str | Path) -> Tokenizer:
    """The tokenizer of a run: the one that is given, that of its ready stores, or one trained on its sources.

    Training reads the documents of the train split with the lowest SHA-256, up to `sample_bytes` of them.

    Raises:
      SourceError, TokenizerError, StoreError: There is nothing to load or to train on, or `model.vocab_size` is too
        small for it.
    """
    return _resolve_tokenizer(config, _list_sources(config.data), _cache(config, home))


def _cache(config: Config, home: str | Path) -> str | Path:
    """Where tokenizers and stores without a path of their own are kept: a folder, or a URL below a bucket's."""
    given = config.data.cache_dir or f"{home}/data"
    return given if is_bucket(given) else Path(given).expanduser()


def _noted(place: str | Path, folder: Path) -> str:
    """How prepared.json in `folder` says where a store is: what lies beside it moves along with it."""
    if is_bucket(place):
        return str(place)
    path, here = Path(place).absolute(), folder.absolute()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)  # a way up would not lead through links


def _resolve_tokenizer(config: Config, listings: dict[str, Listing], folder: str | Path) -> Tokenizer:
    data, settings = config.data, config.data.tokenizer
    if settings.path or settings.kind == "bytes":
        tokenizer = load_tokenizer(settings.kind, Path(settings.path).expanduser())
    elif settings.kind != "sentencepiece":
        raise TokenizerError(f"data.tokenizer.kind={settings.kind} needs its file: set data.tokenizer.path")
    elif listings:
        tokenizer = _trained(config, listings, folder)
    else:
        first = next(iter(data.stores.values()))
        tokenizer = TokenStore.open(_place(first.path)).tokenizer()
    if tokenizer.vocab_size > config.model.vocab_size:
        raise TokenizerError(
            f"the {tokenizer.kind} tokenizer has {tokenizer.vocab_size} ids and the embedding only "
            f"{config.model.vocab_size} rows: set model.vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def prepare_store(
    entry: StoreConfig, tokenizer: Tokenizer, out: str | Path, *, workers: int, listing: Listing | None = None
) -> PreparedStore:
    """Makes the store `out` from its source, or opens it where it is there already.

    Args:
      entry: The store's settings.
      tokenizer: What makes its tokens.
      out: The store's folder, on disk or in a bucket.
      workers: Processes that tokenise; 0: one a core.
      listing: The source as listed before; None: it is listed now.

    Raises:
      SourceError: The source is not known or matches nothing.
      StoreError: `out` is damaged, no store, or was made of something else.
    """
    begin = time.monotonic()
    listing = listing or list_source(entry.source, entry.text_field)
    place = _place(out)
    built = cache_folder() / "stores" / local_name(place) if isinstance(place, str) else place
    partial = built.with_name(f"{built.name}.partial")
    # Looked for before the lock, so that a ready store can be used from a disk that one may only read.
    store, worked = _find(place, entry, tokenizer, listing), 0
    if store is None or partial.exists() or (built != place and built.exists()):
        with locked(built.with_name(f".{built.name}.lock"), waiting=functools.partial(_waiting, built)):
            partial.mkdir(exist_ok=True)
            store = _find(place, entry, tokenizer, listing)
            if store is None and _find(built, entry, tokenizer, listing) is None:
                worked = _build(entry, tokenizer, built, workers=workers, listing=listing, partial=partial)
            if isinstance(place, str) and built.exists():  # perhaps its way there was interrupted
                if store is None:
                    publish(built, Folder(place))
                keep_as_copies(built)
            if store is None:
                store = TokenStore.open(place)
            shutil.rmtree(partial)
    seconds = time.monotonic() - begin
    splits = [store.split(name) for name in SPLITS]
    report = StoreReport(
        path=str(place),
        fingerprint=store.fingerprint,
        reused=not worked,
        seconds=seconds,
        text_bytes=sum(split.num_bytes for split in splits),
        tokens=sum(split.num_tokens for split in splits),
        documents=sum(split.num_documents for split in splits),
        skipped=dict(store.manifest["skipped"]),
        megabytes_per_second=worked / 1e6 / seconds,
    )
    note(_sentence(report))
    return PreparedStore(store, report)


def heldout_documents(store: TokenStore) -> Iterator[bytes]:
    """The bytes of a store's held-out documents, decoded from its tokens, in store order.

    Raises:
      StoreError: A document does not come back with its recorded length.
    """
    split, tokenizer = store.split("heldout"), store.tokenizer()
    for index in range(split.num_documents):
        document = tokenizer.decode(split.document(index).tolist()).encode()
        if len(document) != split.byte_lengths[index]:
            raise StoreError(
                f"held-out document {index} of {store.path} decodes to {len(document)} bytes instead of "
                f"{split.byte_lengths[index]}: prepare the store again"
            )
        yield document


def _build(
    entry: StoreConfig, tokenizer: Tokenizer, out: Path, *, workers: int, listing: Listing, partial: Path
) -> int:
    """Tokenises and merges inside `partial`, then renames the result to `out`; gives the bytes of text tokenised."""
    # The plan's folder carries its name, so that a process left over from another plan cannot write into this one.
    plan = partial / _digest(FORMAT, listing.fingerprint, tokenizer.fingerprint, tokenizer.kind)[:16]
    for other in partial.iterdir():
        if other.is_dir() and other != plan:
            note(f"removing {other}, an interrupted preparation of other data")
            shutil.rmtree(other)
    plan.mkdir(exist_ok=True)
    ends = tokenizers.Ends.of(tokenizer.bos_id, tokenizer.eos_id)
    file = pieces.TokenizerFile(tokenizer.kind, str(plan / (tokenizer.file_name or "none")), ends)
    if tokenizer.file_name:
        tokenizer.save(Path(file.path))
    names = [f"unit-{number:06d}" for number in range(len(listing.units))]
    done = {name: report for name in names if (report := pieces.finished_unit(plan, name))}
    left = [(unit, name) for unit, name in zip(listing.units, names, strict=True) if name not in done]
    if done:
        note(f"going on with an interrupted preparation: {len(done)} of {len(names)} parts are done")
    jobs = ((unit, file, str(plan), name) for unit, name in left)
    total, worked = sum(unit.size for unit, _ in left), 0
    with (
        WorkerPool(worker_count(workers, len(left))) as pool,
        Progress(f"tokenising {entry.source}", total) as progress,
    ):
        for report in pool.map(pieces.tokenise_unit, jobs):
            progress.advance(report.size)
            worked += report.text_bytes
    reports = [report for name in names if (report := pieces.finished_unit(plan, name))]
    skipped: Counter[str] = Counter()
    for report in reports:
        skipped.update(report.skipped)
    staged = plan / "store"
    shutil.rmtree(staged, ignore_errors=True)
    writer = StoreWriter(staged, tokenizer)
    skipped["duplicate"] += pieces.merge_runs(
        plan, reports, writer=writer, vocab_size=tokenizer.vocab_size, permille=entry.heldout_permille
    )
    source = {
        "spec": entry.source,
        "text_field": entry.text_field,
        "files": listing.files,
        "bytes": listing.size,
        "listing": listing.fingerprint,
    }
    manifest = writer.finish(heldout_permille=entry.heldout_permille, source=source, skipped=skipped)
    if not any(split["documents"] for split in manifest["splits"].values()):
        raise SourceError(f"the source {entry.source!r} gives no documents (skipped: {dict(skipped)})")
    os.rename(staged, out)
    _sync_folder(out.parent)
    return worked


def _place(given: str | Path) -> str | Path:
    """A store's place as a folder, or as the URL that it is."""
    return str(given) if is_bucket(given) else Path(given).expanduser()


def _find(out: str | Path, entry: StoreConfig, tokenizer: Tokenizer, listing: Listing) -> TokenStore | None:
    """The store at `out`, None where there is nothing; raises StoreError where it is not the one asked for."""
    if not (has_store(Folder(out)) if isinstance(out, str) else out.exists()):
        return None
    store = TokenStore.open(out)
    store.check_tokenizer(tokenizer)
    made, wanted = store.manifest["source"].get("listing"), listing.fingerprint
    if made != wanted:
        raise StoreError(
            f"{out} was made from {store.manifest['source'].get('spec')!r} as it was then, and {entry.source!r} is "
            "something else now (names, sizes or times differ): remove the store, give another path, or set the "
            "store's source to '' to use it as it is"
        )
    if store.manifest["heldout_permille"] != entry.heldout_permille:
        raise StoreError(
            f"{out} holds out {store.manifest['heldout_permille']} documents in a thousand, not "
            f"{entry.heldout_permille}: set heldout_permille to that, remove the store, or give another path"
        )
    return store


def _open_given(name: str, entry: StoreConfig, tokenizer: Tokenizer) -> TokenStore:
    """A store that exists already."""
    if not entry.path:
        raise StoreError(f"data.stores.{name} has neither a source nor a path: set one of them")
    store = TokenStore.open(_place(entry.path))
    store.check_tokenizer(tokenizer)
    return store


def _open_prepared(config: Config, record: Path) -> Prepared:
    """What another process has prepared."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # the second: what a crash of the machine may have left of it
        raise StoreError(f"{record} is not there, or not whole: the process that builds has to come first") from None
    if content["key"] != _config_key(config):
        raise StoreError(f"{record} was written for other data settings: run `maxlm prepare` with this config")
    places = content["stores"].items()
    stores = {name: TokenStore.open(path if is_bucket(path) else record.parent / path) for name, path in places}
    tokenizer = next(iter(stores.values())).tokenizer()
    return Prepared(tokenizer, stores, {})


def _list_sources(data: DataConfig) -> dict[str, Listing]:
    """The listings of the stores that have a source."""
    if not data.stores:
        raise SourceError("data.stores is empty: name at least one corpus")
    return {name: list_source(entry.source, entry.text_field) for name, entry in data.stores.items() if entry.source}


def _trained(config: Config, listings: dict[str, Listing], folder: str | Path) -> Tokenizer:
    """The tokenizer trained on the sources, from `folder` where it was trained before."""
    data, vocab_size, limit = config.data, config.model.vocab_size, config.data.tokenizer.sample_bytes
    permilles = {name: data.stores[name].heldout_permille for name in listings}
    sources = sorted((listing.fingerprint, permilles[name]) for name, listing in listings.items())
    identity = _digest(tokenizers.TRAINING, vocab_size, limit, sources)
    path = Path(cache_folder() if isinstance(folder, str) else folder) / f"tokenizer-{identity[:12]}.model"
    if not path.exists() and not (isinstance(folder, str) and fetch_or_none(Folder(folder), path.name, path)):
        begin = time.monotonic()
        jobs = [(unit, permilles[name]) for name, listing in listings.items() for unit in listing.units]
        sample = _sample(jobs, limit, data.workers)
        size = sum(len(document) for document in sample)
        note(f"training a tokenizer of {vocab_size} pieces on {size / 1e6:.1f} MB of {len(sample)} documents")
        model = tokenizers.train_sentencepiece((text.decode(errors="ignore") for text in sample), vocab_size)
        write_among_others(path, model)
        if isinstance(folder, str):
            Folder(folder).upload(path, path.name)
        note(f"trained {path} in {time.monotonic() - begin:.1f} s")
    return load_tokenizer("sentencepiece", path)


def _sample(jobs: list[tuple[Any, int]], limit: int, workers: int) -> list[bytes]:
    """The training documents with the lowest digests, `limit` bytes of them, the last one cut."""
    found: dict[bytes, bytes] = {}
    ceiling = b""  # grows lower while units come in, so that later ones send less

    def arguments() -> Iterator[tuple]:
        for unit, permille in jobs:
            yield unit, permille, limit, ceiling

    total = sum(unit.size for unit, _ in jobs)
    with (
        WorkerPool(worker_count(workers, len(jobs))) as pool,
        Progress("sampling for the tokenizer", total) as progress,
    ):
        for sampled in pool.map(pieces.sample_unit, arguments()):
            found = dict(pieces.lowest(found | dict(sampled.documents), limit))
            size = sum(map(len, found.values()))
            if size >= limit:
                ceiling = max(found)
            progress.advance(sampled.size)
    documents = [found[digest] for digest in sorted(found)]
    if not documents:
        raise SourceError("the sources give no training documents to train a tokenizer on")
    excess = max(0, sum(map(len, documents)) - limit)
    documents[-1] = documents[-1][: len(documents[-1]) - excess]
    return documents


def _waiting(built: Path) -> None:
    note(f"another process is preparing {built}: waiting for it")


def _sentence(report: StoreReport) -> str:
    rate = report.text_bytes / max(report.tokens, 1)
    what = (
        f"{report.documents} documents, {report.text_bytes / 1e6:.1f} MB, {report.tokens} tokens, {rate:.2f} bytes each"
    )
    if report.reused:
        return f"using {report.path}: {what}"
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(report.skipped.items()) if count) or "none"
    return (
        f"made {report.path} in {report.seconds:.1f} s, {report.megabytes_per_second:.1f} MB/s: {what}; "
        f"skipped: {skipped}"
    )


def _config_key(config: Config) -> str:
    """A hash of the settings that decide what a run reads."""
    return _digest(repr(dict(config.data.stores)), repr(config.data.tokenizer), config.model.vocab_size)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Brings a rename to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
