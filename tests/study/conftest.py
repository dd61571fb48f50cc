"""A study that has run, for the tests of what is made of its runs."""

import pytest

from tests.study.fake import Fake, isoflop_study, run


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study that has run, without noise."""
    folder = tmp_path_factory.mktemp("study")
    study = isoflop_study(folder)
    outcome, _ = run(study, folder / "out", Fake(noise=0.001))
    assert outcome.code == 0
    return study, folder / "out"
