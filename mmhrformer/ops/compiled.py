"""Backend for compilers: the reference, which they fuse, and attention by SDPA."""

from __future__ import annotations

from .sdpa import window_attention as window_attention
