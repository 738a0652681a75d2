"""Plot images/s against reported AP, from a file in benchmarks/results.

python benchmarks/draw_speed_ap.py RESULTS.json docs/images/speed_ap.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt

# Label, base, arch and backend of a row, and the AP that mmpose 1.3.2 reports for its config at
# 256x192 (its hrformer_coco.yml, hrnet_coco.yml and vitpose_coco.yml). Ours has the same weights.
KERNELS = 'kernels'
MODELS = [
    ('HRFormer-S, ours', 'ours-fused', 'small', KERNELS, 73.8),
    ('HRFormer-B, ours', 'ours-fused-padded', 'base', KERNELS, 75.4),
    ('HRFormer-S, mmpose', 'mmpose-nchw', 'small', '', 73.8),
    ('HRFormer-B, mmpose', 'mmpose-nchw', 'base', '', 75.4),
    ('HRNet-W32', 'hrnet-w32', '', '', 74.6),
    ('HRNet-W48', 'hrnet-w48', '', '', 75.6),
    ('ViTPose-S', 'vit-s', '', '', 73.9),
    ('ViTPose-B', 'vit-b', '', '', 75.7),
]


def rates(rows: list[dict]) -> dict[tuple[str, str, str], float]:
    """Images/s of CUDA graphs over 64 images, by base, arch and backend."""
    keys = ('base', 'arch', 'backend')
    found = [row for row in rows if row.get('how') == 'graph' and row.get('batch') == 64]
    return {tuple(row[key] for key in keys): row['images_s'] for row in found}


def main(results: str, picture: str) -> None:
    """Draw a picture from a file of results."""
    found = rates(json.loads(Path(results).read_text())['rows'])
    plt.rcParams.update({'svg.hashsalt': 'mmhrformer', 'svg.fonttype': 'none'})
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    for label, base, arch, backend, ap in MODELS:
        rate = found[base, arch, backend]
        color, above = ('C3', -14) if 'ours' in label else ('C0', 6)
        axes.plot(rate, ap, 'o', color=color)
        axes.annotate(label, (rate, ap), (0, above), textcoords='offset points', ha='center')
    axes.set(xscale='log', xlim=(180, 40000), ylim=(73.4, 76.1))
    axes.set(xlabel='images/s, H200, bf16, 64 images of 256x192, CUDA graph')
    axes.set(ylabel='AP on COCO val2017, reported by mmpose')
    axes.grid(alpha=0.3)
    figure.savefig(picture, metadata={'Date': None})


if __name__ == '__main__':
    main(*sys.argv[1:])
