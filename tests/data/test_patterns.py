"""Patterns match what `glob` matches, where that can read everything and comes to an end."""

import glob
import os
from collections import Counter

import pytest

from maxlm.data.patterns import expand

PATTERNS = (
    "", "one.txt", "none", "none/*", "*", "*/", "**", "**/", "**/*.txt", "*/**", "**/a/*", "a/**/b/**", "**/**",
    ".*", "**/.*", ".h/*", ".h/**", "a/.g/**/*", "?/*.[tm]*", "a/[!b]*", "one.txt/**", "one.txt/*", "gone/**", "gone",
    "gone/", "self/*", "*/one.txt", "*/b", "**/more/*", "link/", "link/**", "none/**", "a/../*.txt", "**x/*", "[*]",
)  # fmt: skip


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in (
        "one.txt",
        "a/one.txt",
        "a/b/two.md",
        "a/b/c/three.txt",
        "a/.g/x/four.txt",
        ".h/five.txt",
        "z/b/six.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    links = {
        "link": "a/b",
        "z/more": "../a",
        "z/again": "../a",
        "gone": "nowhere",
        "self": "self",
        "z/f.txt": "../one.txt",
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_are_those_of_glob(tree, pattern):
    """Also under each of the names that a folder has: a source that was listed so before is the same one now."""
    for asked in (pattern, f"{tree}/{pattern}"):
        assert Counter(expand(asked)) == Counter(filter(None, glob.glob(asked, recursive=True)))


def test_links_in_a_circle_come_to_an_end(tree):
    """`glob` gives each file about forty times with one such link, and never ends with a few."""
    for name in ("a/up", "a/b/up", "a/b/c/up", "z/b/up"):
        (tree / name).symlink_to(tree)
    files = Counter(os.path.realpath(path) for path in expand("**/*.txt"))
    names = ("one.txt", "a/one.txt", "a/b/c/three.txt", "z/b/six.txt")
    assert files == {str(tree / name): 1 + (name == "one.txt") for name in names}  # z/f.txt is another name of it
    # What is asked for by the name of such a link is found.
    assert "a/b/c/up/one.txt" in expand("**/c/up/*.txt")


def test_links_between_neighbours_come_to_an_end(tmp_path):
    """Of twelve folders that link to each other there are more than a milliard ways."""
    for one in range(12):
        (tmp_path / f"{one}").mkdir()
        (tmp_path / f"{one}" / "x.txt").write_text("x")
        for other in range(12):
            (tmp_path / f"{one}" / f"to{other}").symlink_to(tmp_path / f"{other}")
    assert len({os.path.realpath(path) for path in expand(f"{tmp_path}/**/*.txt")}) == 12


@pytest.mark.parametrize("pattern", ["closed/*", "*/*", "**", "**/*.txt", "closed/x/one.txt/*", "*/x"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, pattern):
    (tmp_path / "closed" / "x").mkdir(parents=True)

    def refusing(real):  # as the system does to everybody but root, who may run this test
        def ask(path):
            if "/closed" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return ask

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(os, "lstat", refusing(os.lstat))
    with pytest.raises(PermissionError, match="closed"):
        expand(f"{tmp_path}/{pattern}")
