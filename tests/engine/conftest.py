"""Fixtures for the runs of the engine's tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Runs are cut off here, machines are not: what was written is there without ``fsync``.

    On a busy disk each call takes seconds, and a run of 16 iterations makes a dozen of them.
    """
    monkeypatch.setattr(os, 'fsync', lambda file: None)
