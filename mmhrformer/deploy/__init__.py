"""Deployment of models: folding, compilation, export."""
