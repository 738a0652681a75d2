"""What trained models see in images and videos."""
