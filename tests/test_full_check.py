"""The full check begins only when it is asked for: it makes `.venv` anew and installs what it needs."""

import subprocess

import pytest

from tools import full_check


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--quikstart", 2), ("all", 2)])
def test_a_word_that_it_does_not_know_starts_nothing(word, code, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("something was started"))
    with pytest.raises(SystemExit) as left:
        full_check.main([word])
    assert left.value.code == code
