"""Fixtures for the runs of the engine's tests."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Runs are cut off here, machines are not: what was written is there without ``fsync``.

    On a busy disk each call takes seconds, and a run of 16 iterations makes a dozen of them.
    """
    monkeypatch.setattr(os, 'fsync', lambda file: None)


@pytest.fixture(autouse=True)
def no_pause_between_epochs(monkeypatch):
    """mmengine sleeps for 2 s wherever a run by iterations begins with the data anew."""
    monkeypatch.setattr('mmengine.runner.loops.time', SimpleNamespace(sleep=lambda seconds: None))
