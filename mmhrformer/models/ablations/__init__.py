"""Variants of attention, FFN and backbone for the ablations of the paper."""
