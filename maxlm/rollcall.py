"""A roll call of all processes before JAX joins them: who has not come, and who runs something else.

Processes of different configs, code or packages compile different programs, and hang in the first collective without
a word; and JAX itself ends the process from C++ when another does not come, without saying which. So process 0 first
listens at the coordinator's own address. Each process sends it one line with its number, its host and what it is about
to run; process 0 answers all of them with the same line: go, or the names of the missing and the odd ones. The
connections stay open: by them the processes notice later when one is gone (`maxlm.heartbeat`).
The address is as open as JAX's coordinator is right after: keep it inside the cluster's network.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import maxlm
from maxlm.config import Config
from maxlm.errors import UserError
from maxlm.resolve import leaves

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint")
# EX_NOHOST of sysexits.h: not all processes have come. The same command, on all hosts, may well work later.
EXIT_ABSENT = 68
JOIN_SECONDS = 300  # how long a process waits for the others to come, unless it is told otherwise
CODE = "MAXLM_CODE"  # variable: what `tree_digest` of the code has to be, where the launcher knows
_LINE = 1 << 20  # bytes of a line at most
_MARGIN = 15.0  # seconds by which process 0 may have started later than one that waits for its answer
_SHOWN = 8  # processes or differences that a message lists


class Place(NamedTuple):
    """Where the processes meet: host:port of process 0, how many they are and which this one is.

    bind: host:port at which process 0 listens; None: all addresses of its host.
    """

    coordinator: str
    processes: int
    process: int
    bind: str | None = None


class Line(NamedTuple):
    """A connection to another process, open since the roll call: from process 0 to each, from each to process 0."""

    process: int
    host: str
    socket: socket.socket


class Absent(UserError):
    """Not all processes have come in time."""

    exit_code = EXIT_ABSENT


class _Told(NamedTuple):
    """What process 0 has answered, and the connections that the answer went over."""

    verdict: str
    lines: list[Line]
    absent: bool = False  # the verdict is that some have not come


class Verdict(NamedTuple):
    """What is wrong with the processes that have come, in words, "" for nothing; and whether some have not."""

    text: str
    absent: bool = False


def run_facts(config: Config) -> dict[str, str]:
    """What has to be the same on every host for the programs to be the same: settings, code, packages.

    Raises:
      UserError: the code is not the one that the variable MAXLM_CODE names.
    """
    facts = {f"config {path}": repr(value) for path, _, value in leaves(config)}
    package = Path(maxlm.__file__).parent
    facts["code of maxlm"] = code_digest(package)
    if (asked := os.environ.get(CODE)) and asked != (found := tree_digest(package.parent)):
        raise UserError(
            f"code and configs here are not those of the commit which was asked for (digest {found}, expected "
            f"{asked}); build the image of a clean tree of that commit, or say --commit of the image's"
        )
    facts["python"] = platform.python_version()
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    return facts


def code_digest(*folders: Path) -> str:
    """A short digest of all Python files below the folders: the version of the code that really runs."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def tree_digest(root: Path) -> str:
    """`code_digest` of the package and of the configs beside it: an image may have brought an old config along."""
    return code_digest(root / "maxlm", root / "configs")


def roll_call(place: Place, facts: Mapping[str, str], *, timeout: float) -> list[Line]:
    """Returns on every process, with its lines, when all have come within `timeout` seconds and agree on all facts.

    Raises:
      UserError: on every process alike: two claim one number, or a fact differs; the message names them by number and,
        where they have been heard of, by host.
      Absent: on every process alike: some did not come.
    """
    mine = {"process": place.process, "host": socket.gethostname(), "processes": place.processes, "facts": dict(facts)}
    told = asyncio.run(_hear(place, mine, timeout)) if place.process == 0 else _ask(place, mine, timeout)
    if told.verdict:
        for line in told.lines:
            line.socket.close()
        raise (Absent if told.absent else UserError)(told.verdict)
    return told.lines


def judge(cards: list[dict[str, Any]], processes: int, *, timeout: float, coordinator: str) -> Verdict:
    """Whether the run may begin with the processes that have come, of which process 0 is the first."""
    for card in cards:
        if card["processes"] != processes:
            return Verdict(
                f"process {card['process']} on {card['host']} was started as one of {card['processes']}, the others as "
                f"of {processes}; give all the same number of processes"
            )
    hosts: dict[int, list[str]] = {}
    for card in cards:
        hosts.setdefault(card["process"], []).append(card["host"])
    for number, names in sorted(hosts.items()):
        if len(names) > 1:
            return Verdict(
                f"process {number} was started more than once: on {', '.join(sorted(names))}; give each its own number"
            )
    if missing := [number for number in range(processes) if number not in hosts]:
        beside = [
            f"{number} (its neighbour {number - 1} is on {hosts[number - 1][0]})"
            if number - 1 in hosts
            else f"{number}"
            for number in missing
        ]
        return Verdict(
            f"{len(missing)} of {processes} processes did not come to {coordinator} within {timeout:g} s: "
            f"{_some(beside)}. See that they were started, and that the address can be reached from their hosts",
            absent=True,
        )
    odd = []
    for fact in dict.fromkeys(name for card in cards for name in card["facts"]):
        values = [card["facts"].get(fact, "absent") for card in cards]
        # The most common value is taken for what was meant; between equals that of process 0, which comes first.
        expected = Counter(values).most_common(1)[0][0]
        odd += [
            f"process {card['process']} on {card['host']} has {fact} {value}, the others {expected}"
            for card, value in zip(cards, values, strict=True)
            if value != expected
        ]
    if odd:
        return Verdict(
            f"the processes do not run the same: {_some(odd, '; ')}. Give all hosts one version and one config"
        )
    return Verdict("")


def _some(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


async def _hear(place: Place, mine: dict[str, Any], timeout: float) -> _Told:
    """Process 0's side: hears all, judges and answers."""
    complete = asyncio.Event()
    here: list[tuple[dict[str, Any], asyncio.StreamWriter]] = []

    def cards() -> list[dict[str, Any]]:
        return sorted([mine, *(card for card, _ in here)], key=lambda card: card["process"])

    if place.processes == 1:
        complete.set()

    async def heard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            card = _card(await reader.readline())
        except (ValueError, OSError):  # not one of ours, or it went away: the roll goes on without it
            writer.close()
            return
        _keep_alive(writer.get_extra_info("socket"))
        here.append((card, writer))
        odd = any(card["processes"] != place.processes for card in cards())  # no use to wait for the rest
        if odd or {card["process"] for card in cards()} >= set(range(place.processes)):
            complete.set()
        with contextlib.suppress(OSError):
            await reader.read(1)  # before the verdict nothing comes but the end
        if not complete.is_set():  # it has left, and may come again
            here.remove((card, writer))
            writer.close()

    host, port = (place.bind or f":{_port(place.coordinator)}").rsplit(":", 1)
    try:
        server = await asyncio.start_server(heard, host.strip("[]") or None, int(port), limit=_LINE, reuse_address=True)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {place.bind or place.coordinator} ({error.strerror or error}); an earlier run "
            "may still be there, or the address is not this host's"
        ) from error
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(complete.wait(), timeout)
    complete.set()
    server.close()
    verdict = judge(cards(), place.processes, timeout=timeout, coordinator=place.coordinator)
    lines = []
    for card, writer in here:
        with contextlib.suppress(OSError):  # it has gone; its line will say so
            answer = {"verdict": verdict.text, "absent": verdict.absent, "host": mine["host"]}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        # The copy outlives asyncio's transport, which ends here.
        lines.append(Line(card["process"], card["host"], writer.get_extra_info("socket").dup()))
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return _Told(verdict.text, lines, verdict.absent)


def _card(line: bytes) -> dict[str, Any]:
    """A line that was heard, as a card. Raises ValueError for anything else."""
    card = json.loads(line)
    if not isinstance(card, dict) or set(card) != {"process", "host", "processes", "facts"}:
        raise ValueError("not a card")
    numbers = (card["process"], card["processes"])
    if not all(isinstance(number, int) for number in numbers) or not isinstance(card["facts"], dict):
        raise ValueError("not a card")
    return card


def _ask(place: Place, mine: dict[str, Any], timeout: float) -> _Told:
    """The others' side: says who this is and waits for the answer."""
    deadline, seen, before = time.monotonic() + timeout, "nothing listens there", ""
    host, port = place.coordinator.rsplit(":", 1)
    while (left := deadline - time.monotonic()) > 0:
        connection: socket.socket | None = None
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
            _keep_alive(connection)
            connection.sendall(json.dumps(mine).encode() + b"\n")
            # Process 0 may have begun to count after this one.
            connection.settimeout(timeout + _MARGIN)
            line = _read_line(connection)
            if not line:
                before = "it was there and has left; then: "
                raise ConnectionResetError("it hangs up")
            answer = json.loads(line)
            lines = [Line(0, str(answer["host"]), connection)]
            return _Told(str(answer["verdict"]), lines, bool(answer["absent"]))
        except TimeoutError:
            seen = "it does not answer"
        except OSError as error:
            seen = before + (error.strerror or str(error))
        except (ValueError, TypeError, KeyError):
            seen = "something else answers there, perhaps an earlier run"
        if connection is not None:
            connection.close()
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
    return _Told(
        f"this is process {place.process} of {place.processes} on {mine['host']}: process 0 was not found at "
        f"{place.coordinator} within {timeout:g} s ({seen}); see that it was started and that the address can be "
        "reached from here",
        [],
        absent=True,
    )


def _keep_alive(connection: Any) -> None:
    """Lets the end of a host that dies, or forgets the connection, be seen while nothing is said: in a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _read_line(connection: socket.socket) -> bytes:
    """The first line that comes, and not a byte of what follows it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _LINE:
        byte = connection.recv(1)
        if not byte:
            break
        line += byte
    return line


def _port(address: str) -> int:
    return int(address.rsplit(":", 1)[1])
