"""What the paper compares HRFormer with."""
