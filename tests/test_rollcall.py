"""The roll call: all have come and run the same, or every process says who did not."""

import contextlib
import json
import re
import socket
import threading
import time
from pathlib import Path

import pytest

import maxlm
from maxlm import rollcall
from maxlm.errors import UserError
from maxlm.rollcall import Absent, Place, judge, roll_call
from tests.tiny import tiny_config

FACTS = {"code of maxlm": "aa", "config train.steps": "3"}


def address() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def call(numbers, *, processes, facts=None, sizes=None, timeout=1.0, before=lambda where: None):
    """What each of the processes was told; None: go."""
    where, told, facts, sizes = address(), {}, facts or {}, sizes or {}

    def one(index, number):
        try:
            size = sizes.get(number, processes)
            roll_call(Place(where, size, number), facts.get(number, FACTS), timeout=timeout)
            told[index] = None
        except UserError as error:
            assert error.exit_code == (68 if "did not come" in str(error) or "not found" in str(error) else 1)
            told[index] = str(error)

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(numbers)]
    for number, thread in enumerate(threads):
        thread.start()
        if number == 0:
            before(where)
    for thread in threads:
        thread.join()
    return told


def test_all_come_and_go():
    assert call([2, 0, 1], processes=3, timeout=10) == {0: None, 1: None, 2: None}


def test_who_does_not_come_is_named_to_those_who_did_within_the_time():
    began = time.monotonic()
    told = call([0, 2], processes=4, timeout=1.5)
    assert time.monotonic() - began < 3
    host = socket.gethostname()
    for message in told.values():
        assert "2 of 4 processes did not come" in message and "within 1.5 s" in message
        assert f"1 (its neighbour 0 is on {host})" in message and f"3 (its neighbour 2 is on {host})" in message


def test_without_process_0_each_says_who_it_is():
    (message,) = call([1], processes=2, timeout=0.3).values()
    assert re.search(
        r"process 1 of 2 on .*: process 0 was not found at localhost:\d+ within 0.3 s \(Connection", message
    )


def test_the_odd_one_out_is_named_on_every_host():
    told = call([0, 1, 2], processes=3, facts={0: FACTS | {"config train.steps": "4"}}, timeout=10)
    host = socket.gethostname()
    for message in told.values():
        assert f"process 0 on {host} has config train.steps 4, the others 3" in message and "code" not in message


def test_one_that_counts_otherwise_is_named_at_once():
    began = time.monotonic()
    told = call([0, 1], processes=3, sizes={1: 2}, timeout=10)
    assert time.monotonic() - began < 5 and len(told) == 2
    assert all(
        f"process 1 on {socket.gethostname()} was started as one of 2, the others as of 3" in m for m in told.values()
    )


def test_code_that_is_not_the_commits_is_refused(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    root = Path(maxlm.__file__).parent.parent
    monkeypatch.setenv("MAXLM_CODE", rollcall.tree_digest(root))
    rollcall.run_facts(config)
    monkeypatch.setenv("MAXLM_CODE", "0123456789abcdef")
    with pytest.raises(UserError, match="expected 0123456789abcdef.; build the image of a clean tree"):
        rollcall.run_facts(config)


def test_an_old_config_is_other_code_too(tmp_path):
    for name in ("maxlm/cli.py", "configs/x.py", "tests/test_x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("steps = 1\n")
    before = rollcall.tree_digest(tmp_path)
    (tmp_path / "tests/test_x.py").write_text("steps = 2\n")
    assert rollcall.tree_digest(tmp_path) == before
    (tmp_path / "configs/x.py").write_text("steps = 2\n")
    assert rollcall.tree_digest(tmp_path) != before


def test_one_number_twice_is_said():
    told = call([0, 1, 1], processes=3, timeout=1)
    assert all("process 1 was started more than once" in message for message in told.values())


def greet(where, greeting):
    host, port = where.split(":")
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(greeting)
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(1) == b""  # process 0 has seen that it is gone
            return
        except ConnectionRefusedError:
            time.sleep(0.01)


def card(number, processes):
    facts = {"process": number, "host": "h", "processes": processes, "facts": FACTS}
    return json.dumps(facts).encode() + b"\n"


def test_one_that_leaves_before_all_are_there_may_come_again():
    told = call([0, 1, 2], processes=3, timeout=10, before=lambda where: greet(where, card(1, 3)))
    assert told == {0: None, 1: None, 2: None}


def test_one_that_leaves_before_all_are_there_is_missing():
    told = call([0, 2], processes=3, timeout=1.5, before=lambda where: greet(where, card(1, 3)))
    assert len(told) == 2 and all("1 of 3 processes did not come" in message for message in told.values())


def test_process_0_that_leaves_before_all_are_there_is_named():
    where, told = address(), []

    def ask():
        with pytest.raises(Absent) as error:
            roll_call(Place(where, 2, 1), FACTS, timeout=1.5)
        told.append(str(error.value))

    thread = threading.Thread(target=ask)
    with socket.create_server(("localhost", int(where.split(":")[1]))) as server:
        thread.start()
        connection, _ = server.accept()
        assert connection.makefile().readline()
        connection.close()
    thread.join()
    assert "within 1.5 s (it was there and has left; then: Connection refused)" in told[0]


def test_strangers_at_the_door_do_not_stop_the_roll():
    def strangers(where):
        for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"process": "x"}\n', b"[1]\n"):
            greet(where, greeting)

    assert call([0, 1], processes=2, timeout=10, before=strangers) == {0: None, 1: None}


def test_an_earlier_run_at_the_address_is_suspected():
    where = address()
    with socket.create_server(("localhost", int(where.split(":")[1]))), pytest.raises(UserError, match="earlier run"):
        roll_call(Place(where, 2, 0, where), FACTS, timeout=1)


def test_a_thousand_odd_hosts_are_counted_not_listed():
    cards = [
        {"process": number, "host": f"h{number}", "processes": 999, "facts": {"jax": "1" if number % 3 else "2"}}
        for number in range(999)
    ]
    message, absent = judge(cards, 999, timeout=1, coordinator="a:1")
    assert not absent
    assert "process 0 on h0 has jax 2, the others 1" in message and "and 325 more" in message


def test_facts_tell_settings_code_and_packages_apart(tmp_path):
    config = tiny_config(tmp_path)
    before, after = rollcall.run_facts(config), rollcall.run_facts(tiny_config(tmp_path, train__steps=21))
    assert [name for name in before if before[name] != after[name]] == ["config train.steps"]
    assert before["jax"][0].isdigit() and before["python"].startswith("3.")
    (tmp_path / "a.py").write_text("x = 1\n")
    digest = rollcall.code_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert rollcall.code_digest(tmp_path) != digest
