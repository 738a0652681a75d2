"""Forms for compilers: the plain ones, which they merge, and attention as one operator."""

from __future__ import annotations

from .sdpa import window_attention as window_attention
