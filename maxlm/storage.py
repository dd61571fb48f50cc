"""Folders in buckets (`gs://bucket/folder`, `s3://bucket/folder`), read and written object by object.

TensorStore's drivers do the talking: JAX's checkpoints bring it along, it retries what may go better the next time, and
it signs with the credentials that it finds by itself, so that none passes through our hands. An object is whole or not
there, but there is no rename: what consists of several objects is committed by writing one of them last.

The environment says how to get there, as for other programs: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a
profile, or the machine's role), AWS_REGION, AWS_ENDPOINT_URL for other services than Amazon's;
GOOGLE_APPLICATION_CREDENTIALS (or the machine's account) for Google's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from maxlm.errors import UserError

# Read by TensorStore when it first connects: a connection that has gone silent counts as broken, and is tried again.
os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "20")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}  # half a minute in all
ANSWER_SECONDS = 300.0  # for one object, retries included
_PIECE = 16 << 20  # bytes of an object that are read at once
_AT_ONCE = 8  # pieces that are asked for at once
_LARGEST = {"s3": 5 << 30, "gs": 5 << 40}  # bytes of an object that is written by one request
UNUSED_DAYS = 30  # after which what nobody has asked for is removed from this machine, where it is a copy
_URL = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*))?")
_DAMAGE = ("NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE", "DATA_LOSS", "INVALID_ARGUMENT")


class StorageError(UserError, OSError):
    """A bucket did not answer, or refused; what was asked for may well be there."""


def is_bucket(place: str | Path) -> bool:
    """Whether a place is meant to be in a bucket, well written or not."""
    return "://" in str(place)


def cache_folder() -> Path:
    """Where this machine keeps copies of what is in buckets: MAXLM_CACHE, or ~/.cache/maxlm."""
    return Path(os.environ.get("MAXLM_CACHE") or "~/.cache/maxlm").expanduser()


@contextlib.contextmanager
def on_this_machine(copy: Path) -> Iterator[None]:
    """What this machine's own disk refuses inside, while `copy` is made or read, becomes a StorageError.

    It is no damage to what is in the bucket. Errors in our words, which bear no number of the system's, stay.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise StorageError(
            f"{copy}, a copy of what is in a bucket, cannot be kept on this machine ({error.strerror}): see that "
            f"{cache_folder()} can be written and has room, or set MAXLM_CACHE to a folder on another disk"
        ) from error


def local_name(url: str) -> str:
    """A name for the copy of what is at `url`, for a person to recognise and of no other URL."""
    url = url.rstrip("/")
    readable = re.sub("[^A-Za-z0-9]+", "-", url)[-40:].strip("-")
    return f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


class Folder:
    """A folder in a bucket. It is there as soon as something is written below it.

    Raises:
      UserError: `url` is none that is understood.
    """

    def __init__(self, url: str):
        found = _URL.fullmatch(url.rstrip("/"))
        parts = found[3].split("/") if found and found[3] else []
        if not found or any(part in ("", ".", "..") or re.search(r"[\x00-\x1f]", part) for part in parts):
            raise UserError(f"{url} cannot be used: expected gs://BUCKET/FOLDER, s3://BUCKET/FOLDER or a local folder")
        self.url = url.rstrip("/")
        self._scheme, self._bucket, self._prefix = found[1], found[2], f"{found[3]}/" if found[3] else ""
        self._store: Any = None

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        """The folder that it is in."""
        return Folder(self.url.rpartition("/")[0])

    def spec(self) -> dict[str, Any]:
        """The folder as TensorStore's description of a key-value store."""
        if self._scheme == "gs":
            return {
                "driver": "gcs",
                "bucket": self._bucket,
                "path": self._prefix,
                "context": {"gcs_request_retries": RETRIES},
            }
        spec: dict[str, Any] = {
            "driver": "s3",
            "bucket": self._bucket,
            "path": self._prefix,
            "context": {"s3_request_retries": RETRIES},
        }
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint:
            spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        elif region:
            spec["aws_region"] = region
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            spec["aws_credentials"] = {"type": "environment"}  # the usual search complains of files that are not there
        return spec

    def read(self, name: str) -> bytes:
        """The content of an object.

        Raises:
          FileNotFoundError: there is none.
          StorageError: it could not be asked for.
        """
        found = self._ask(name, lambda store: store.read(name))
        if found.state != "value":
            raise FileNotFoundError(f"{self.url}/{name} is not there")
        return found.value

    def write(self, name: str, content: bytes | str) -> None:
        """Puts an object there, whole; one of this name is replaced."""
        self._ask(name, lambda store: store.write(name, content))

    def names(self) -> list[str]:
        """All objects below, by their names from here on, in order."""
        return sorted(key.decode() for key in self._ask("", lambda store: store.list()))

    def remove(self, name: str) -> None:
        """Deletes an object, if it is there."""
        self._ask(name, lambda store: store.write(name, None))

    def delete(self) -> None:
        """Deletes every object below."""
        self._ask("", lambda store: store.delete_range(_everything()))

    def upload(self, file: Path, name: str) -> None:
        """Copies a file there. Raises StorageError, too, for one that is too large."""
        self.check_size(file)
        self.write(name, file.read_bytes())

    def check_size(self, file: Path) -> None:
        """Raises StorageError for a file that is too large for one object."""
        if (size := file.stat().st_size) > (largest := _LARGEST[self._scheme]):
            raise StorageError(
                f"{file} has {size / 2**30:.1f} GiB, and an object of {self.url} may have {largest >> 30} at most"
            )

    def download(
        self, name: str, file: Path, *, sha256: str = "", came_on: Callable[[int], None] = lambda size: None
    ) -> None:
        """Copies an object here: beside `file`, compared with its SHA-256 (hex) if that is known, and moved there.

        Args:
          came_on: called with the size of each piece that has come.

        Raises:
          FileNotFoundError: there is no such object.
          StorageError: it could not be read, its bytes are others, or this machine has no room for it.
        """
        beside, digest = file.with_name(f".{file.name}.{os.getpid()}"), hashlib.sha256()
        with on_this_machine(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with beside.open("wb") as out, contextlib.closing(self._pieces(name)) as pieces:
                    for piece in pieces:
                        out.write(piece)
                        digest.update(piece)
                        came_on(len(piece))
                    out.flush()
                    os.fsync(out.fileno())
                if sha256 and digest.hexdigest() != sha256:
                    raise StorageError(f"{self.url}/{name} is damaged: its SHA-256 is not the one that was noted")
                beside.replace(file)
            finally:
                beside.unlink(missing_ok=True)

    def _pieces(self, name: str) -> Generator[bytes]:
        """An object in pieces, in their order. Of a larger one several are under way: a single stream is slow."""
        piece = self._piece(name, 0)
        yield piece
        if len(piece) < _PIECE:
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = (pool.submit(self._piece, name, start) for start in itertools.count(_PIECE, _PIECE))
            coming = deque(itertools.islice(asked, _AT_ONCE - 1))
            try:
                while len(piece) == _PIECE:  # who has asked beyond the end gets nothing
                    coming.append(next(asked))
                    piece = coming.popleft().result()
                    yield piece
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _piece(self, name: str, start: int) -> bytes:
        """What an object holds from `start` on, as much as is read at once; nothing from its end on."""
        for part in (slice(start, start + _PIECE), slice(start, None)):
            try:
                found = self._ask(name, functools.partial(_read_part, name=name, part=part))
            except ValueError as error:
                if not str(error).startswith("OUT_OF_RANGE"):
                    raise
                continue  # it ends before this part does, or before it begins
            if found.state != "value":
                raise FileNotFoundError(f"{self.url}/{name} is not there")
            return found.value
        return b""

    def _ask(self, name: str, request: Callable[[Any], Any]) -> Any:
        """The answer to a request, with its errors in our words."""
        import tensorstore

        try:
            if self._store is None:
                self._store = tensorstore.KvStore.open(self.spec()).result(timeout=ANSWER_SECONDS)
            return request(self._store).result(timeout=ANSWER_SECONDS)
        except (ValueError, TimeoutError) as error:
            raise trouble(error, f"{self.url}/{name}") from None


def trouble(error: Exception, where: str) -> Exception:
    """An error of TensorStore's as a StorageError, or as it was if the storage answered and what it holds is wrong."""
    if isinstance(error, TimeoutError):
        return StorageError(
            f"{where} did not answer within {ANSWER_SECONDS:g} s: see that the network and the credentials are there"
        )
    text = str(error)
    if not isinstance(error, ValueError) or (text.startswith(_DAMAGE) and "NoSuchBucket" not in text):
        return error
    reason = " ".join(re.sub(r" \[(http_response_body|tensorstore_spec|x-amzn-requestid)=.*", "", text).split())
    return StorageError(f"{where} cannot be used: {reason[:300]}")


def _read_part(store: Any, *, name: str, part: slice) -> Any:
    return store.read(name, byte_range=part)


def _everything() -> Any:
    import tensorstore

    return tensorstore.KvStore.KeyRange()
