"""Measure speed and memory of HRFormer and of other models: ``benchmarks/benchmark.py``."""

import sys
from pathlib import Path

from mmhrformer.cli.launch import run_script

run_script(Path(__file__).resolve().parents[1] / 'benchmarks/benchmark.py', sys.argv[1:])
