"""The commands of ``python -m mmhrformer``."""
