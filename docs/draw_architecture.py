"""Draw the figure of the architecture.

python docs/draw_architecture.py                 # writes docs/images/architecture.svg
python docs/draw_architecture.py figure.png      # or another file, of any format of matplotlib
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

OUT = Path(__file__).with_name('images') / 'architecture.svg'
INK, FAINT, PANEL = '#26323f', '#5f6d7c', '#f3f5f8'
STREAMS = ('#2f6db5', '#2a9d8f', '#e09f3e', '#c8553d')  # finest to coarsest
ROWS = (4.1, 2.9, 1.85, 0.95)  # where the streams run
HEIGHTS = (0.92, 0.66, 0.46, 0.32)  # finer streams are taller
STAGES = {2: (3.55, '1 module'), 3: (6.75, '4 modules (tiny: 3)'), 4: (9.95, '2 modules')}
STAGE_WIDTH = 2.5


def box(ax: Axes, x: float, y: float, w: float, h: float, text: str = '', **kwargs) -> None:
    """Draw a rounded box around its centre, with a text in it."""
    style = dict(facecolor='white', edgecolor=INK, linewidth=1.1) | kwargs
    colour = style.pop('color', INK)
    size = style.pop('size', 8.5)
    shape = 'round,pad=0,rounding_size=0.06'
    ax.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle=shape, **style))
    ax.text(x, y, text, ha='center', va='center', fontsize=size, color=colour, linespacing=1.3)


def arrow(ax: Axes, start: tuple, end: tuple, colour: str = INK, width: float = 1.2) -> None:
    """Draw an arrow from a point to another."""
    style = dict(arrowstyle='-|>', color=colour, lw=width, shrinkA=0, shrinkB=0, mutation_scale=9)
    ax.annotate('', end, start, arrowprops=style)


def note(ax: Axes, x: float, y: float, text: str, **kwargs) -> None:
    """Write a small text."""
    style = dict(ha='center', va='center', fontsize=8, color=INK, linespacing=1.35) | kwargs
    ax.text(x, y, text, **style)


def draw_start(ax: Axes) -> None:
    """Image, stem and the two bottlenecks."""
    y = ROWS[0]
    box(ax, 0.55, y, 0.8, 1.3, 'image\n\nH x W', facecolor=PANEL)
    box(ax, 1.62, y, 0.72, 1.1, 'stem\ntwo 3x3,\nstride 2')
    box(ax, 2.72, y, 0.86, 1.1, 'layer1\ntwo\nbottlenecks')
    for start, end in ((0.95, 1.26), (1.98, 2.29), (3.15, 3.72)):
        arrow(ax, (start, y), (end, y))
    note(
        ax, 1.6, 2.75, 'C, 2C, 4C, 8C channels\nC = 18 (tiny),\n32 (small), 78 (base)', color=FAINT
    )


def draw_stage(ax: Axes, stage: int) -> None:
    """Blocks on each stream of a stage, and the exchange behind them."""
    left, modules = STAGES[stage]
    bottom = ROWS[stage - 1] - HEIGHTS[stage - 1] / 2 - 0.22
    top = ROWS[0] + HEIGHTS[0] / 2 + 0.22
    size = (STAGE_WIDTH, top - bottom)
    shape = 'round,pad=0,rounding_size=0.12'
    ax.add_patch(FancyBboxPatch((left, bottom), *size, boxstyle=shape, fc=PANEL, ec='none'))
    note(ax, left + STAGE_WIDTH / 2, top + 0.2, f'stage {stage}: {modules}', fontsize=10)
    blocks, start, end = left + 0.62, left + 1.08, left + STAGE_WIDTH - 0.2
    for i, j in product(range(stage), repeat=2):
        width = 1.6 if i == j else 0.9
        ax.plot([start, end], [ROWS[j], ROWS[i]], color=STREAMS[j], lw=width, zorder=1)
    for y, colour in zip(ROWS[:stage], STREAMS):
        ax.add_patch(Circle((end, y), 0.13, facecolor='white', edgecolor=colour, lw=1.4, zorder=2))
        note(ax, end, y, '+', color=colour, zorder=3, fontsize=10)
    for y, height, colour in zip(ROWS[:stage], HEIGHTS, STREAMS):
        style = dict(facecolor=colour, edgecolor='white', color='white', size=8)
        box(ax, blocks, y, 0.86, height, '2 blocks', **style)


def draw_transitions(ax: Axes) -> None:
    """The way from stage to stage, and the stride-2 convolutions that start new streams."""
    lefts = [left for left, _ in STAGES.values()]
    for before, after, streams in zip(lefts, lefts[1:], (2, 3)):
        start, end = before + STAGE_WIDTH - 0.07, after + 0.19
        for i in range(streams):
            arrow(ax, (start, ROWS[i]), (end, ROWS[i]), STREAMS[i], 1.6)
        new = streams
        arrow(ax, (start + 0.08, ROWS[new - 1] - 0.04), (end, ROWS[new]), FAINT, 1.4)
    arrow(ax, (3.28, ROWS[0] - 0.04), (lefts[0] + 0.19, ROWS[1]), FAINT, 1.4)
    text = 'gray: a 3x3 convolution of stride 2\nstarts the next stream'
    note(ax, 4.8, 1.75, text, color=FAINT)


def draw_tasks(ax: Axes) -> None:
    """What becomes of the streams."""
    start = STAGES[4][0] + STAGE_WIDTH - 0.07
    for i, (y, colour) in enumerate(zip(ROWS, STREAMS)):
        arrow(ax, (start, y), (start + 0.42, y), colour, 1.6)
        note(ax, start + 0.49, y, f'1/{2 ** (i + 2)}', ha='left', color=colour, fontsize=10)
    x = start + 1.87
    for y, title, text in (
        (4.15, 'pose', '1x1 convolution on\nthe 1/4 stream: heatmaps'),
        (2.75, 'segmentation', 'all streams at 1/4,\nOCR head: classes of pixels'),
        (1.35, 'classification', 'HRFormerFusion: one map\nat 1/32, pooled, linear'),
    ):
        box(ax, x, y, 1.75, 1.05, f'{title}\n\n{text}', size=8)


def draw_block(ax: Axes) -> None:
    """The transformer block, from left to right."""
    y = -1.95
    note(ax, 0.15, -0.55, 'Block', ha='left', va='baseline', fontsize=11, weight='bold')
    arrow(ax, (0.15, y), (0.55, y))
    parts = (
        (0.95, 0.7, 'layer\nnorm', 'white'),
        (2.1, 1.2, 'attention in\n7x7 windows', '#dbe7f4'),
        (4.0, 0.7, 'layer\nnorm', 'white'),
        (5.75, 2.35, 'FFN: 1x1, depth-wise 3x3, 1x1\n(each: batch norm, GELU)', '#d9efec'),
    )
    for x, width, text, colour in parts:
        box(ax, x, y, width, 0.85, text, facecolor=colour)
    for start, end in ((1.3, 1.5), (2.7, 2.99), (3.25, 3.65), (4.35, 4.575), (6.925, 7.19)):
        arrow(ax, (start, y), (end, y))
    arrow(ax, (7.45, y), (7.85, y))
    for entry, plus in ((0.3, 3.12), (3.42, 7.32)):
        ax.plot([entry, entry, plus, plus], [y, y + 0.8, y + 0.8, y + 0.13], color=INK, lw=1.1)
        ax.add_patch(Circle((plus, y), 0.13, facecolor='white', edgecolor=INK, lw=1.1, zorder=3))
        note(ax, plus, y, '+', zorder=4, fontsize=10)
    note(
        ax, 2.1, y - 0.75, 'queries, keys, values of a window;\nrelative position bias', color=FAINT
    )
    note(ax, 5.75, y - 0.75, '4 times as many channels inside;\nconnects the windows', color=FAINT)


def draw_windows(ax: Axes) -> None:
    """Four windows of tokens, the attention of one token, and the reach of the FFN."""
    left, bottom, cell, n = 8.6, -3.0, 0.145, 7
    note(
        ax,
        left,
        -0.55,
        'Receptive field of a token',
        ha='left',
        va='baseline',
        fontsize=11,
        weight='bold',
    )
    for row in range(2 * n):
        for column in range(2 * n):
            inside = row >= n and column < n
            colour = '#dbe7f4' if inside else 'white'
            corner = (left + column * cell, bottom + row * cell)
            ax.add_patch(Rectangle(corner, cell, cell, fc=colour, ec='#c6ced8', lw=0.5))
    for i in range(2):
        for j in range(2):
            corner = (left + i * n * cell, bottom + j * n * cell)
            side = n * cell
            ax.add_patch(Rectangle(corner, side, side, fill=False, ec=STREAMS[0], lw=1.4))
    token = (left + 6 * cell, bottom + 9 * cell)
    kernel = (token[0] - cell, token[1] - cell)
    ax.add_patch(Rectangle(kernel, 3 * cell, 3 * cell, fc='#2a9d8f55', ec=STREAMS[1], lw=1.6))
    ax.add_patch(Rectangle(token, cell, cell, fc=INK, ec='none'))
    x = left + 2 * n * cell + 0.25
    legend = dict(ha='left', va='center', fontsize=8.5)
    note(ax, x, -1.45, 'blue: attention,\nall tokens of its window', color=STREAMS[0], **legend)
    note(
        ax,
        x,
        -2.2,
        'green: depth-wise 3x3,\nacross the border\nof the window',
        color='#1f7a6f',
        **legend,
    )


def draw_exchange(ax: Axes) -> None:
    """How a stream comes to the size of another."""
    left = 13.0
    note(ax, left, -0.55, 'Exchange', ha='left', va='baseline', fontsize=11, weight='bold')
    text = dict(ha='left', va='center', fontsize=8.5)
    note(
        ax,
        left,
        -1.35,
        'to a coarser stream:\ndepth-wise 3x3 of stride 2\nand 1x1, repeated',
        **text,
    )
    note(ax, left, -2.1, 'to a finer stream:\n1x1, then upsampled', **text)
    note(ax, left, -2.7, 'each stream: the sum, ReLU', **text)


def draw() -> plt.Figure:
    """Draw everything.

    Returns:
        plt.Figure: The figure.
    """
    figure = plt.figure(figsize=(14.6, 8.6), facecolor='white')
    ax = figure.add_axes((0.005, 0.005, 0.99, 0.99))
    ax.set(xlim=(0, 15.4), ylim=(-3.35, 5.25))
    ax.axis('off')
    draw_start(ax)
    for stage in STAGES:
        draw_stage(ax, stage)
    draw_transitions(ax)
    draw_tasks(ax)
    ax.plot([0.15, 15.2], [-0.15, -0.15], color='#d5dbe2', lw=1)
    draw_block(ax)
    draw_windows(ax)
    draw_exchange(ax)
    return figure


if __name__ == '__main__':
    # Equal bytes from equal versions of matplotlib.
    plt.rcParams['svg.hashsalt'] = 'mmhrformer'
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    metadata = {'Date': None} if target.suffix == '.svg' else None
    draw().savefig(target, dpi=110, metadata=metadata)
    print(target)
