"""A training that is killed goes on exactly where it was."""

from __future__ import annotations

import pytest
from kill_and_resume import TOLERANCE, kill_and_resume

pytestmark = pytest.mark.e2e


@pytest.mark.slow
def test_killed_runs_equal_one_that_was_left_alone(copy, tmp_path, monkeypatch):
    """The second kill of three comes while a checkpoint is being written."""
    monkeypatch.setattr('kill_and_resume.ROOT', copy)
    tally = kill_and_resume(tmp_path / 'runs', kills=3, seed=0)
    assert tally.kills == 3
    assert tally.while_writing == 1
    assert max(tally.difference, tally.weights) <= TOLERANCE
