"""Shared fixtures of the checkpoint tests."""

from __future__ import annotations

import logging

import pytest
from mmengine.logging import MMLogger


@pytest.fixture
def messages():
    """Messages logged during a test."""
    logger, handler, seen = MMLogger.get_current_instance(), logging.Handler(logging.INFO), []
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)
