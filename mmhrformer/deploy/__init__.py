"""Models made ready for use: folded, compiled, exported."""
