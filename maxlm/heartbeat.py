"""Several processes watch over each other: when one is gone, hangs or fails, all leave, and say which one it was.

A collective waits for a dead process for ever, and JAX ends the others from C++ after minutes without a name. So the
connections of the roll call stay open. Over each goes a beat every few seconds, from every process to process 0 and
back. A connection that closes without a farewell means that the process has died; one that is silent for `limit`
seconds, that its host is dead or that it hangs as a whole (a process whose threads live while its step does not end is
for the watchdog, `maxlm.train.watchdog`). Process 0 tells all what it has seen; whatever happens to process 0 itself is
seen by each. They leave with EXIT_LOST, so that whatever started them starts them again. A process whose work has
failed tells the others, and they leave with its EXIT_FAILED: who counts failures must not see the loss of a host here.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from maxlm.errors import UserError
from maxlm.rollcall import Line

# EX_UNAVAILABLE of sysexits.h: another process is lost or the step hangs; the same command, on all hosts, continues.
EXIT_LOST = 69
EXIT_FAILED = 1  # the work has failed, here or on the process that has told of it: it may well fail again
SILENCE_SECONDS = 60
_BEATS = 6  # beats within the limit
_SHORTEST, _LONGEST = 0.1, 5.0  # seconds between beats
_GRACE = 3.0  # seconds in which a process may fail by itself with what another has failed with
_VERDICT = 5.0  # seconds in which the cause of a failed collective is known
_LAST_WORDS = 3.0  # seconds that what has to be written at the end may take
_RECEIVED = 1 << 16  # bytes taken from a connection at once


class Standing(NamedTuple):
    """Where a process is in the run: the step that it works on, and what it does (a bucket of its ledger)."""

    step: int
    doing: str


class _Peer:
    """What is known of the process at the other end of a line."""

    def __init__(self, line: Line, now: float):
        self.process, self.host, self.socket = line
        self.name = f"process {self.process} on {self.host}"
        self.heard = now
        self.left = False  # it has said farewell
        self.standing = Standing(0, "start")
        self.received, self.unsent = b"", b""


class Heartbeat:
    """The lines of this process, watched by a thread from now on; without lines nothing is done.

    Attributes:
      standing: says where this process is; the loop sets it.
      last_words: called, with little time, before the process is ended by its thread.

    Args:
      lines: of `rollcall.roll_call`.
      process: number of this one.
      limit: seconds of silence after which a process counts as lost.
      leave: ends the process with an exit code, at once.
    """

    def __init__(
        self,
        lines: Sequence[Line] = (),
        *,
        process: int = 0,
        limit: float = SILENCE_SECONDS,
        leave: Callable[[int], Any] = os._exit,
    ):
        self.standing: Callable[[], Standing] = lambda: Standing(0, "start")
        self.last_words: Callable[[], None] = lambda: None
        self._process, self._limit, self._leave = process, limit, leave
        self._name = f"process {process} on {socket.gethostname()}"
        self._interval = min(max(limit / _BEATS, _SHORTEST), _LONGEST)
        self._peers = {line.process: _Peer(line, time.monotonic()) for line in lines}
        self._ended = threading.Event()  # by a verdict or a farewell
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        for peer in self._peers.values():
            peer.socket.setblocking(False)
            self._selector.register(peer.socket, selectors.EVENT_READ, peer)
        if self._peers:
            threading.Thread(target=self._watch, daemon=True, name="heartbeat").start()

    def run(self, work: Callable[[], int]) -> int:
        """Does the work of this process and returns its exit code; if it fails, the others hear of it and leave too.

        With lines, a failure ends the process here: JAX would wait for the others at its exit. After the work nobody
        needs anybody any more, and each ends in its own time.
        """
        if not self._peers:
            return work()
        try:
            code = work()
        except BaseException as error:
            self._failed(error)
            raise  # only where `leave` returns
        self._tell({"bye": True})
        self._ended.set()
        return code

    def stuck(self, why: str) -> None:
        """Ends all processes: a step does not end. Process 0 says who is behind; the others follow it."""
        behind = self._behind()
        self.leave_together(f"{why}; {behind}" if behind else why, code=EXIT_LOST)

    def leave_together(self, why: str, *, code: int) -> None:
        """Ends all processes with an exit code: this one at once, the others when they hear of it."""
        if self._process:
            self._tell({"failed": f"{self._name}: {why}", "code": code})
        self._end(why, code=code)

    def _behind(self) -> str:
        """Which processes are not where the others are, in words; process 0 alone knows."""
        if self._process or not self._peers:
            return ""
        places = {self._name: self.standing()} | {peer.name: peer.standing for peer in self._peers.values()}
        farthest = max(place.step for place in places.values())
        behind = [f"{name} is at step {place.step} ({place.doing})" for name, place in places.items()]
        late = [text for text, place in zip(behind, places.values(), strict=True) if place.step < farthest]
        if late:
            return f"the farthest is at step {farthest}, {', '.join(late[:8])}"
        return f"all processes are at step {farthest}: a device, the network or the storage does not answer"

    # --- the thread

    def _watch(self) -> None:
        beaten = looked = time.monotonic()
        while not self._ended.is_set():
            ready = self._selector.select(self._interval / 2)
            now = time.monotonic()
            if now - looked > self._limit / 2:  # this process itself was stopped: it cannot say who was silent
                for peer in self._peers.values():
                    peer.heard = now
            looked = now
            for key, _ in ready:
                self._hear(key.data, now)
            if now - beaten >= self._interval:
                beaten = now
                self._tell({"at": list(self.standing())})
            for peer in self._peers.values():
                if not peer.left and now - peer.heard > self._limit:
                    silent = f"{peer.name} has been silent for {now - peer.heard:.0f} s"
                    self._end(f"{silent}: it hangs, or its host is gone", lost=peer)

    def _hear(self, peer: _Peer, now: float) -> None:
        try:
            data = peer.socket.recv(_RECEIVED)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(peer.socket)
            if not peer.left and not self._ended.is_set():
                peer.left = True
                self._end(f"{peer.name} is gone: it was killed, or ended without a word", lost=peer)
            return
        peer.heard = now
        *lines, peer.received = (peer.received + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # a line torn by a signal at the other end is no reason to leave
                self._take(peer, json.loads(line))

    def _take(self, peer: _Peer, word: dict[str, Any]) -> None:
        """What another process says."""
        if "at" in word:
            peer.standing = Standing(*word["at"])
        peer.left = peer.left or "bye" in word
        if "failed" in word:
            peer.left = True
            if self._process == 0:  # the others are told, then this process leaves with them
                self._tell(word, but=peer)
            self._ended.wait(_GRACE)  # all may have met with the same; then each has its own message
            self._end(word["failed"], code=word["code"])
        if "end" in word:
            self._end(word["end"], code=word["code"])

    def _tell(self, word: dict[str, Any], *, but: _Peer | None = None) -> None:
        """Sends a word to all at the other ends, as far as they take it without waiting."""
        line = json.dumps(word).encode() + b"\n"
        with self._lock:
            for peer in self._peers.values():
                if peer is but or (peer.unsent and "at" in word):
                    continue  # a beat is not worth a queue
                peer.unsent += line
                with contextlib.suppress(OSError):
                    peer.unsent = peer.unsent[peer.socket.send(peer.unsent) :]

    def _end(self, why: str, *, code: int = EXIT_LOST, lost: _Peer | None = None) -> None:
        """Tells all and ends this process; the first reason counts. Nobody waits for the one that is lost."""
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
        if self._process == 0:
            self._tell({"end": why, "code": code})
        _say(
            f"\nmaxlm: {why}. {self._name} leaves with exit code {code}; started again, the run goes on from its "
            "newest checkpoint\n"
        )
        self._speak_last()
        self._linger(lost)
        self._leave(code)

    def _failed(self, error: BaseException) -> None:
        """Ends this process because its work failed; unless the failure comes from the loss of another."""
        expected = isinstance(error, UserError)
        if not expected and self._ended.wait(_VERDICT):
            time.sleep(_LAST_WORDS + _VERDICT)  # the thread is ending the process
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        self._tell({"failed": f"{self._name} failed: {' '.join(text.split())[:2000]}", "code": EXIT_FAILED})
        _say(f"maxlm: {error}\n" if expected else "".join(traceback.format_exception(error)))
        self._speak_last()
        self._linger()
        self._leave(EXIT_FAILED)

    def _speak_last(self) -> None:
        """Lets the run write what it has to, for a short while: its disk may be what hangs."""
        words = threading.Thread(target=self.last_words, daemon=True)
        words.start()
        words.join(_LAST_WORDS)
        sys.stdout.flush()

    def _linger(self, lost: _Peer | None = None) -> None:
        """Process 0 leaves last: with it goes JAX's coordinator, and JAX ends those who are left without a word."""
        deadline = time.monotonic() + _GRACE + _LAST_WORDS
        waiting = [peer.socket for peer in self._peers.values() if peer is not lost] if self._process == 0 else []
        while waiting and time.monotonic() < deadline:
            for connection in list(waiting):
                try:
                    if not connection.recv(_RECEIVED):
                        waiting.remove(connection)
                except BlockingIOError:
                    continue
                except OSError:
                    waiting.remove(connection)
            time.sleep(0.02)


def _say(text: str) -> None:
    """Writes to the standard error without its buffer, whose lock a hanging thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
