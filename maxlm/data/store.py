"""The token store: tokenised documents on disk, memory-mapped, described and proved by one manifest.

`docs/data.md` gives the format. A store has the splits `train` and `heldout`. A split's tokens form one long array,
cut into shards of `shard_tokens` tokens each (the last one is shorter); a document is `[begin token] + pieces` and
may lie across shards. Documents are in the order of the SHA-256 of their bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from maxlm.data.staging import MANIFEST, Staged, read_manifest
from maxlm.data.tokenizers import Ends, Tokenizer, TokenizerError, load_tokenizer
from maxlm.errors import UserError
from maxlm.files import file_digest
from maxlm.storage import Folder, StorageError, is_bucket

FORMAT = 1
SPLITS = ("train", "heldout")
SHARD_TOKENS = 2**28
OPEN_FILES = 2**16  # that a process asks to be allowed to hold, as far as the system lets it …
FEWER_FILES = 10240  # … and where it refuses that many: what every macOS allows


class StoreError(UserError):
    """A folder that is no token store, a damaged one, or one made with other settings."""


class Split:
    """The tokens of one split, addressed by their index over all shards.

    Args:
      entry: What the manifest says of the split.
      find: Gives the path of a file of the store, as the manifest describes it.
      dtype: Of the tokens in the shards.
      shard_tokens: Tokens a shard.
    """

    def __init__(
        self,
        entry: Mapping[str, Any],
        find: Callable[[Mapping[str, Any]], Path],
        *,
        dtype: np.dtype,
        shard_tokens: int,
    ):
        self.num_documents: int = entry["documents"]
        self.num_tokens: int = entry["tokens"]
        self.num_bytes: int = entry["bytes"]
        self.offsets = _load_array(find(entry["offsets"]), self.num_documents + 1)
        self.byte_lengths = _load_array(find(entry["byte_lengths"]), self.num_documents)
        self._shard_tokens, self._dtype = shard_tokens, dtype
        self._entries, self._find = entry["shards"], find
        self._shards: list[np.ndarray | None] = [None] * len(self._entries)

    def check_shards(self) -> None:
        """Looks at the sizes of all shards now rather than when they are first read: one may be missing or cut."""
        for entry in self._entries:
            self._check_size(entry)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` (int32), wherever shards begin and end.

        Raises:
          IndexError: The range is not inside the split.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} were asked of a split of {self.num_tokens}")
        out = np.empty(stop - start, np.int32)
        position = start
        while position < stop:
            shard, local = divmod(position, self._shard_tokens)
            piece = self._shard(shard)[local : local + stop - position]
            out[position - start : position - start + piece.size] = piece
            position += piece.size
        return out

    def document(self, index: int) -> np.ndarray:
        """The tokens (int32) of a document, its begin token first."""
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))

    def _shard(self, number: int) -> np.ndarray:
        """The tokens of a shard, mapped."""
        found = self._shards[number]
        if found is None:
            path = self._check_size(self._entries[number])
            try:
                mapped = np.memmap(path, self._dtype, mode="r")
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                raise StoreError(
                    f"{path} cannot be opened: each shard is a file, and this process may hold no more than "
                    f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]} open; type `ulimit -n {OPEN_FILES}` before the "
                    "command, or have the limit raised on this machine"
                ) from None
            # A plain array over the map: indexing a np.memmap pays for its subclass on every access.
            found = self._shards[number] = np.asarray(mapped).view(np.ndarray)
        return found

    def _check_size(self, entry: Mapping[str, Any]) -> Path:
        """The file of a shard. Raises StoreError: it has another size than it should."""
        path = self._find(entry)
        size, expected = path.stat().st_size, entry["tokens"] * self._dtype.itemsize
        if size != expected:
            raise StoreError(f"{path} has {size} bytes instead of {expected}: prepare the store again")
        return path


class TokenStore:
    """A store opened from its folder, or from the bucket that it is in.

    Args:
      place: The folder, or the bucket's.
      manifest: What the store says of itself.
      staged: What copies the files of a bucket; None for a folder.
    """

    def __init__(self, place: str | Path, manifest: Mapping[str, Any], *, staged: Staged | None = None):
        self.place = place
        self.path = staged.folder if staged else Path(place)  # of the files, as far as they have been read
        self.manifest = manifest
        self._staged = staged
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._splits = {
            name: Split(manifest["splits"][name], self._file, dtype=dtype, shard_tokens=manifest["shard_tokens"])
            for name in SPLITS
        }

    @classmethod
    def open(cls, place: str | Path) -> TokenStore:
        """Opens a store and checks its manifest and the size of every file, but not their bytes (see `verify`).

        Of a store in a bucket the shards are copied, and proved by their hashes, when they are first read.

        Raises:
          StoreError: The folder is missing, is no store, is of another format, or a file is missing or cut.
          StorageError: The bucket cannot be read.
        """
        remote = Folder(str(place)) if is_bucket(place) else None
        try:
            content = read_manifest(remote) if remote else (Path(place) / MANIFEST).read_bytes()
            manifest = json.loads(content.decode())
            if manifest["format"] != FORMAT:
                raise StoreError(
                    f"{place} is a token store of format {manifest['format']}, this version reads format {FORMAT}: "
                    "prepare it again"
                )
            if manifest["fingerprint"] != fingerprint_of(manifest):
                raise StoreError(f"the manifest of {place} was changed after it was written: prepare the store again")
            store = cls(place, manifest, staged=Staged(remote, manifest) if remote else None)
            if not remote:
                for split in store._splits.values():
                    split.check_shards()
            _allow_open_files()
            tokenizer = store._tokenizer_file
        except StorageError:
            raise
        except FileNotFoundError as error:
            missing = error.filename or str(error).partition(" ")[0]
            what = "it has no manifest.json" if missing.endswith(MANIFEST) else f"{missing} is missing"
            raise StoreError(
                f"{place} is not a complete token store, {what}: prepare it with `maxlm prepare`"
            ) from None
        except NotADirectoryError:
            raise StoreError(f"{place} is a file, not the folder of a token store") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise StoreError(f"{place}/{MANIFEST} cannot be read ({error!r}): prepare the store again") from None
        if tokenizer and not tokenizer.is_file():
            raise StoreError(f"{place} is not a complete token store, {tokenizer} is missing: prepare it again")
        return store

    def verify(self) -> None:
        """Reads every byte and compares it with the manifest.

        Raises:
          StoreError: A file's bytes are not those that were written; the file is named.
        """
        for name in SPLITS:
            entry = self.manifest["splits"][name]
            for item in (*entry["shards"], entry["offsets"], entry["byte_lengths"]):
                path = self._file(item)  # of a bucket's it is compared there
                if self._staged is None and file_digest(path) != item["sha256"]:
                    raise StoreError(f"{path} is damaged, its SHA-256 changed: prepare the store again")
        try:
            self.check_tokenizer(self.tokenizer())
        except ValueError as error:
            raise StoreError(
                f"the tokenizer inside {self.place} is damaged ({error}): prepare the store again"
            ) from None

    def on_arrival(self, came_on: Callable[[], None]) -> None:
        """From now on calls `came_on` when a part of the store has come from its bucket, on the thread that waits."""
        if self._staged is not None:
            self._staged.came_on = came_on

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the store's content: tokens, documents and tokenizer, not paths or times."""
        return self.manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer."""
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def bos_id(self) -> int:
        """The token that begins every document."""
        return self.manifest["tokenizer"]["bos_id"]

    def split(self, name: str) -> Split:
        """The split `train` or `heldout`."""
        return self._splits[name]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens, from its copy inside the store.

        Raises:
          TokenizerError: Its file is missing or unfit.
          StoreError: The bucket's file is another than the manifest says.
          StorageError: The bucket cannot be read.
        """
        entry = self.manifest["tokenizer"]
        if self._staged is None or not entry["file"]:
            return self._load_tokenizer()
        with contextlib.suppress(TokenizerError):
            if (found := self._load_tokenizer()).fingerprint == entry["fingerprint"]:
                return found
        self._staged.again(entry["file"])  # the manifest has no SHA-256 of it, by which a damaged copy were found
        if (found := self._load_tokenizer()).fingerprint != entry["fingerprint"]:
            raise StoreError(
                f"{self.place}/{entry['file']} is damaged: its fingerprint is {found.fingerprint[:12]}, the manifest "
                f"says {entry['fingerprint'][:12]}; bring the file back, or prepare the store again"
            )
        return found

    def _load_tokenizer(self) -> Tokenizer:
        entry = self.manifest["tokenizer"]
        ends = Ends.of(entry["bos_id"], entry.get("eos_id"))  # which is of no matter to the tokens: older ones lack it
        return load_tokenizer(entry["kind"], self._tokenizer_file or "", ends=ends)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises StoreError where the store's tokens are not those of `tokenizer`."""
        entry = self.manifest["tokenizer"]
        if (entry["fingerprint"], entry["bos_id"]) != (tokenizer.fingerprint, tokenizer.bos_id):
            raise StoreError(
                f"{self.place} was made with a {entry['kind']} tokenizer {entry['fingerprint'][:12]} that begins with "
                f"{entry['bos_id']}, the run's is {tokenizer.kind} {tokenizer.fingerprint[:12]} and begins with "
                f"{tokenizer.bos_id}: set data.tokenizer to the store's own "
                f"({self._tokenizer_file}) or prepare the store again under another path"
            )

    @property
    def _tokenizer_file(self) -> Path | None:
        name = self.manifest["tokenizer"]["file"]
        return self._file({"file": name}) if name else None

    def _file(self, item: Mapping[str, Any]) -> Path:
        """A file of the store by what the manifest says of it; one of a bucket is copied if it has to be."""
        name, size = item["file"], item.get("tokens", 0) * np.dtype(self.manifest["dtype"]).itemsize
        if Path(name).name != name:
            raise StoreError(f"the manifest of {self.place} names {name!r}, which is no file of its folder")
        if self._staged is None:
            return self.path / name
        return self._staged.file(name, sha256=item.get("sha256", ""), size=size)


class StoreWriter:
    """Writes a store into an empty folder. The manifest comes last: until then the folder is no store.

    Args:
      folder: Where to write; the caller moves it into its place when `finish` has returned.
      tokenizer: The tokenizer of the tokens that will be added.
      shard_tokens: Tokens a shard.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._splits = {
            name: _SplitWriter(folder, name, dtype=self._dtype, shard_tokens=shard_tokens) for name in SPLITS
        }

    def add(self, split: str, tokens: np.ndarray, *, lengths: Sequence[int], byte_lengths: Sequence[int]) -> None:
        """Appends documents to a split.

        Args:
          split: `train` or `heldout`.
          tokens: The documents' tokens one after another, every document with its begin token.
          lengths: Tokens of each document; they sum to the size of `tokens`.
          byte_lengths: UTF-8 bytes of each document.
        """
        self._splits[split].add(np.asarray(tokens), np.asarray(lengths, np.int64), np.asarray(byte_lengths, np.int64))

    def finish(
        self,
        *,
        heldout_permille: int,
        source: Mapping[str, Any] | None = None,
        skipped: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Writes what is left, the tokenizer and the manifest, and gives the manifest back."""
        if self._tokenizer.file_name:
            self._tokenizer.save(self._folder / self._tokenizer.file_name)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "dtype": self._dtype.name,
            "shard_tokens": self._shard_tokens,
            "tokenizer": {
                "kind": self._tokenizer.kind,
                "fingerprint": self._tokenizer.fingerprint,
                "vocab_size": self._tokenizer.vocab_size,
                "bos_id": self._tokenizer.bos_id,
                "eos_id": self._tokenizer.eos_id,
                "file": self._tokenizer.file_name,
            },
            "splits": {name: writer.finish() for name, writer in self._splits.items()},
            "heldout_permille": heldout_permille,
            "source": dict(source or {}),
            "skipped": dict(skipped or {}),
        }
        manifest["fingerprint"] = fingerprint_of(manifest)
        with (self._folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            _flush(file)
        return manifest


class _SplitWriter:
    """One split's shards and arrays, hashed while they are written."""

    def __init__(self, folder: Path, name: str, *, dtype: np.dtype, shard_tokens: int):
        self._folder, self._name, self._dtype, self._shard_tokens = folder, name, dtype, shard_tokens
        self._lengths: list[np.ndarray] = []
        self._byte_lengths: list[np.ndarray] = []
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, byte_lengths: np.ndarray) -> None:
        if int(lengths.sum()) != tokens.size or lengths.size != byte_lengths.size:
            raise ValueError(
                f"{tokens.size} tokens do not make {lengths.size} documents of {int(lengths.sum())} in all"
            )
        self._lengths.append(lengths)
        self._byte_lengths.append(byte_lengths)
        position = 0
        while position < tokens.size:
            if self._file is None:
                file_name = f"{self._name}-{len(self._shards):05d}.bin"
                self._file, self._hash = (self._folder / file_name).open("wb"), hashlib.sha256()
                self._shards.append({"file": file_name, "tokens": 0, "sha256": ""})
            shard = self._shards[-1]
            piece = tokens[position : position + self._shard_tokens - shard["tokens"]]
            data = piece.astype(self._dtype.newbyteorder("<")).tobytes()
            self._file.write(data)
            self._hash.update(data)
            shard["tokens"] += piece.size
            position += piece.size
            if shard["tokens"] == self._shard_tokens:
                self._close_shard()

    def finish(self) -> dict[str, Any]:
        self._close_shard()
        lengths = np.concatenate([np.zeros(1, np.int64), *self._lengths])
        byte_lengths = np.concatenate([np.zeros(0, np.int64), *self._byte_lengths])
        return {
            "documents": byte_lengths.size,
            "tokens": int(lengths.sum()),
            "bytes": int(byte_lengths.sum()),
            "shards": self._shards,
            "offsets": self._save_array("offsets", np.cumsum(lengths)),
            "byte_lengths": self._save_array("bytes", byte_lengths),
        }

    def _save_array(self, what: str, values: np.ndarray) -> dict[str, str]:
        file_name = f"{self._name}-{what}.npy"
        with (self._folder / file_name).open("wb") as file:
            np.save(file, values.astype("<i8"))
            _flush(file)
        return {"file": file_name, "sha256": file_digest(self._folder / file_name)}

    def _close_shard(self) -> None:
        if self._file is not None:
            _flush(self._file)
            self._file.close()
            self._file = None
            self._shards[-1]["sha256"] = self._hash.hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned dtype that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what a manifest says of the store's content."""
    content = {key: manifest[key] for key in ("format", "dtype", "shard_tokens", "splits")}
    content["tokenizer"] = manifest["tokenizer"]["fingerprint"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(file: Any) -> None:
    """Brings a file's bytes to the disk, so that a rename never outruns them."""
    file.flush()
    os.fsync(file.fileno())


def _allow_open_files() -> None:
    """Lets this process hold many files: a map keeps its shard's open, and shells often give no more than 1,024.

    macOS may say that there is no limit and yet refuse more than its `kern.maxfilesperproc`, as if it were no number.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in (OPEN_FILES, FEWER_FILES):
        wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        with contextlib.suppress(ValueError, OSError):
            return resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _load_array(path: Path, size: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r" if size else None, allow_pickle=False).view(np.ndarray)
    except (ValueError, EOFError) as error:
        raise StoreError(f"{path} cannot be read ({error}): prepare the store again") from None
    if array.shape != (size,) or array.dtype != np.int64:
        raise StoreError(f"{path} holds {array.dtype} {array.shape} instead of {size} int64: prepare the store again")
    return array
