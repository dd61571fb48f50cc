"""A real S3 server (moto) on this machine, whose requests fail, stall or are refused as a test asks."""

import logging
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from maxlm import storage

SECRET = "wJalrXUtnFEMI-marker-that-must-not-be-seen"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}


class Server:
    """S3 over HTTP. Requests are counted; the rules below apply to those that `concerns` says yes to."""

    def __init__(self) -> None:
        moto = pytest.importorskip("moto.server", reason="needs pip install -e '.[parity]'")
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = moto.DomainDispatcherApplication(moto.create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._handle, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._lock = threading.Lock()
        self.heal()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def heal(self) -> None:
        self.count = 0
        self.fail_every = 0  # every n-th request is answered by 503
        self.delay, self.delay_every = 0.0, 0  # every n-th waits so many seconds
        self.refuse = False  # 403, which no retry mends
        self.stall = False  # never an answer
        self.lose = False  # it is done, and the answer is 403
        self.concerns: Callable[[str, str], bool] = lambda method, path: True
        self.seen: list[tuple[str, str]] = []

    def _handle(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asked = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.seen.append(asked)
            self.count += 1
            number = self.count
        if self.concerns(*asked):
            if self.stall:
                time.sleep(600)
            if self.delay_every and number % self.delay_every == 0:
                time.sleep(self.delay)
            if self.lose:
                list(self._app(environ, lambda *answer: None))
            if self.refuse or self.lose:
                return self._error(start, "403 Forbidden", "AccessDenied")
            if self.fail_every and number % self.fail_every == 0:
                return self._error(start, "503 Slow Down", "SlowDown")
        return self._app(environ, start)

    def _error(self, start: Callable[..., Any], status: str, code: str) -> Iterable[bytes]:
        start(status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>as the test wanted</Message></Error>".encode()]

    def make_bucket(self, name: str) -> None:
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{name}", method="PUT"), timeout=60)

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


@pytest.fixture
def bucket(
    server: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[str]:
    """The URL of an empty bucket that answers; copies of what is in it are kept below `tmp_path`."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server.endpoint, "MAXLM_CACHE": f"{tmp_path}/cache"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 4, "initial_delay": "10ms", "max_delay": "50ms"})
    server.heal()
    name = f"bucket-{os.getpid()}-{abs(hash(request.node.nodeid)) % 10**9}"
    server.make_bucket(name)
    yield f"s3://{name}"
    server.heal()
