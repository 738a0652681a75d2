"""What has nothing to do with models."""
