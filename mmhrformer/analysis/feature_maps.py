"""Visualization of the backbone: the four streams, and attention in windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ..deploy.fuse import BLOCKS
from ..inferencers.base import Inferencer
from ..inferencers.image_loading import displayable
from ..inferencers.media import Picture
from ..models.attention import LocalWindowSelfAttention
from ..ops import window_count, window_padding, window_partition
from ..utils.suggest import did_you_mean

DPI = 110
PANEL = 2.6  # inches
TITLE = 0.4
COLORS = 'magma'
HEADS_SHOWN = 4


@dataclass(frozen=True)
class Attention:
    """Attention weights of one query in one block.

    Attributes:
        block (str): Name of the block in the backbone.
        weights (np.ndarray): (heads, window, window); each head sums to 1.
        window (tuple[float, float, float, float]): Left, top, width and height of the window, as
            fractions of the map; it may extend into the padding outside the map.
        query (tuple[int, int]): Row and column of the query in the window.
        size (tuple[int, int]): Height and width of the map.
    """

    block: str
    weights: np.ndarray
    window: tuple[float, float, float, float]
    query: tuple[int, int]
    size: tuple[int, int]


@contextmanager
def recorded(modules: dict[str, nn.Module], outputs: bool) -> Iterator[dict[str, Tensor]]:
    """Record the outputs (or inputs) of modules by name, in the first call of each."""
    kept: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            kept.setdefault(name, (out if outputs else args[0]).detach())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def block_names(backbone: nn.Module) -> list[str]:
    """Names of all transformer blocks, stageS.MODULE.branches.STREAM.BLOCK."""
    names = [name for name, module in backbone.named_modules() if isinstance(module, BLOCKS)]
    if not names:
        raise ValueError(
            f'backbone is a {type(backbone).__name__}, without transformer blocks: use a model '
            'with a torch checkpoint; the blocks of an exported file are not accessible'
        )
    return names


def last_blocks(backbone: nn.Module) -> dict[str, nn.Module]:
    """The last block of each of the four streams, finest first, by name."""
    names = [name for name in block_names(backbone) if name.startswith('stage4.')]
    last = {int(name.split('.')[3]): name for name in names}
    return {last[i]: backbone.get_submodule(last[i]) for i in sorted(last)}


def first_input(
    inferencer: Inferencer, image: Picture, boxes: np.ndarray | None
) -> tuple[dict, np.ndarray]:
    """Model input for an image, or for its first person (pose), and the same as RGB pixels."""
    items = inferencer.prepare(image, boxes)
    if not items:
        raise ValueError(f'inputs={image.name!r}: no people found, nothing to draw; pass boxes')
    pixels = displayable(items[0]['inputs'].numpy().transpose(1, 2, 0))[..., ::-1]
    return items[0], np.ascontiguousarray(pixels)


def stream_maps(
    inferencer: Inferencer, image: Picture, boxes: np.ndarray | None = None
) -> list[np.ndarray]:
    """Compute the four streams of an image after their last blocks, before the last exchange.

    Args:
        inferencer (Inferencer): The model.
        image (Picture): The image.
        boxes (np.ndarray, optional): (N, 4) boxes of people, for pose; the first is used.

    Returns:
        list[np.ndarray]: Maps of shape (H, W, C), finest first.
    """
    item, _ = first_input(inferencer, image, boxes)
    with recorded(last_blocks(inferencer.model.backbone), outputs=True) as maps:
        inferencer.forward([item])
    return [maps[name][0].float().cpu().numpy() for name in maps]


def principal_component(features: np.ndarray) -> np.ndarray:
    """First principal component of the tokens of a map, (H, W, C) to (H, W) in [0, 1].

    Values below the 1st and above the 99th percentile are clipped.
    """
    tokens = features.reshape(-1, features.shape[-1]).astype(np.float64)
    tokens = tokens - tokens.mean(0)
    _, vectors = np.linalg.eigh(tokens.T @ tokens)
    values = (tokens @ vectors[:, -1]).reshape(features.shape[:2])
    low, high = np.percentile(values, [1, 99])
    return np.clip((values - low) / max(high - low, 1e-12), 0, 1)


def draw_features(
    inferencer: Inferencer, image: Picture, boxes: np.ndarray | None = None
) -> np.ndarray:
    """Draw the four streams side by side, each at its own resolution.

    Top row: the first principal component of each stream; bottom row: the same over the image.

    Args:
        inferencer (Inferencer): The model.
        image (Picture): The image.
        boxes (np.ndarray, optional): (N, 4) boxes of people, for pose; the first is used.

    Returns:
        np.ndarray: The picture, (H, W, 3) uint8, RGB.

    Examples:
        >>> segment = get_inferencer('my_config.py', 'my.pth')  # doctest: +SKIP
        >>> (image,) = open_media('street.jpg')  # doctest: +SKIP
        >>> picture = draw_features(segment, image)  # doctest: +SKIP
    """
    _, pixels = first_input(inferencer, image, boxes)
    streams = stream_maps(inferencer, image, boxes)
    maps = _same_sign([principal_component(stream) for stream in streams])
    figure, axes = _panels(2, len(maps) + 1, pixels.shape, titled_rows=1)
    height, width = pixels.shape[:2]
    axes[0, 0].imshow(pixels)
    axes[0, 0].set_title(f'input\n{height} x {width}')
    axes[1, 0].set_visible(False)
    for i, (stream, values) in enumerate(zip(streams, maps), 1):
        rows, columns, channels = stream.shape
        axes[0, i].imshow(values, COLORS, interpolation='nearest', extent=(0, width, height, 0))
        axes[0, i].set_title(f'1/{2 ** (i + 1)}\n{rows} x {columns}, {channels} channels')
        _overlay(axes[1, i], pixels, values)
    figure.suptitle('The four streams: first principal component, alone and over the image')
    return _render(figure)


def _same_sign(maps: list[np.ndarray]) -> list[np.ndarray]:
    """Invert maps where needed to match the previous one: the sign of a component is arbitrary."""
    aligned = maps[:1]
    # The border is mostly background, which should be dark.
    border = np.concatenate([aligned[0][[0, -1]].ravel(), aligned[0][:, [0, -1]].ravel()])
    if border.mean() > aligned[0].mean():
        aligned = [1 - aligned[0]]
    for values in maps[1:]:
        finer = cv2.resize(aligned[-1], values.shape[::-1], interpolation=cv2.INTER_AREA)
        same = ((finer - finer.mean()) * (values - values.mean())).sum() >= 0
        aligned.append(values if same else 1 - values)
    return aligned


def attention_of(
    inferencer: Inferencer,
    image: Picture,
    query: tuple[float, float] = (0.5, 0.5),
    block: str | None = None,
    boxes: np.ndarray | None = None,
) -> list[Attention]:
    """Compute the attention of one position to all positions of its window.

    Args:
        inferencer (Inferencer): The model, not folded.
        image (Picture): The image.
        query (tuple[float, float]): The position, x and y, as fractions of the width and height of
            the model's input. Defaults to the center.
        block (str, optional): Name of a block, such as ``'stage3.0.branches.1.0'``. Defaults to
            None: the last block of each of the four streams.
        boxes (np.ndarray, optional): (N, 4) boxes of people, for pose; the first is used.

    Returns:
        list[Attention]: One per block.

    Raises:
        ValueError: If there is no such block or position, or the attention is of another kind.
    """
    attentions = find_attention(inferencer, query, block)
    item, _ = first_input(inferencer, image, boxes)
    with recorded(attentions, outputs=False) as inputs:
        inferencer.forward([item])
    return [
        _one_query(name, module, inputs[name][:1].float(), query)
        for name, module in attentions.items()
    ]


def find_attention(
    inferencer: Inferencer, query: tuple[float, float], block: str | None
) -> dict[str, LocalWindowSelfAttention]:
    """Check the arguments of :func:`attention_of`; return the blocks' attention, by name."""
    if len(query) != 2 or not all(0 <= value < 1 for value in query):
        raise ValueError(f'query={tuple(query)}: expected x and y in [0, 1)')
    backbone = inferencer.model.backbone
    names = block_names(backbone)
    if block is not None and block not in names:
        raise ValueError(
            f'block={block!r}: the backbone has no such block. {did_you_mean(block, names)} Blocks '
            f'are named stageS.MODULE.branches.STREAM.BLOCK, {names[0]} to {names[-1]}'
        )
    blocks = {block: backbone.get_submodule(block)} if block else last_blocks(backbone)
    attentions = {name: module.attn for name, module in blocks.items()}
    for name, module in attentions.items():
        if not isinstance(module, LocalWindowSelfAttention):
            raise ValueError(
                f'block={name!r} has attention of type {type(module).__name__}, which is not '
                'supported; build the inferencer with fuse=False and LocalWindowSelfAttention'
            )
    return attentions


@torch.no_grad()
def attention_weights(attention: LocalWindowSelfAttention, x: Tensor) -> Tensor:
    """Attention weights of all queries of a map (B, H, W, C), from the module's own layers.

    Args:
        attention (LocalWindowSelfAttention): The module.
        x (Tensor): Its input, (B, H, W, C).

    Returns:
        Tensor: (B * windows, heads, N, N), where N = window * window; rows sum to 1.
    """
    windows = window_partition(x, attention.window_size)
    qkv = attention.qkv(windows).unflatten(-1, (3, attention.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B * nW, heads, N, head_dim) each
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    bias = attention.attention_bias(x.shape[1:3], qkv)
    return (logits if bias is None else logits + bias).softmax(-1)


def _one_query(
    name: str, attention: LocalWindowSelfAttention, x: Tensor, query: tuple[float, float]
) -> Attention:
    """Select the weights of one query."""
    height, width = x.shape[1:3]
    side = attention.window_size
    top, left = window_padding(height, side)[0], window_padding(width, side)[0]
    row, column = int(query[1] * height) + top, int(query[0] * width) + left
    number = row // side * window_count(width, side) + column // side
    weights = attention_weights(attention, x)[number, :, row % side * side + column % side]
    place = ((column // side * side - left) / width, (row // side * side - top) / height)
    return Attention(
        block=name,
        weights=weights.reshape(-1, side, side).cpu().numpy(),
        window=(*place, side / width, side / height),
        query=(row % side, column % side),
        size=(height, width),
    )


def draw_attention(
    inferencer: Inferencer,
    image: Picture,
    query: tuple[float, float] = (0.5, 0.5),
    block: str | None = None,
    boxes: np.ndarray | None = None,
) -> np.ndarray:
    """Draw the attention of one position to all positions of its window.

    One row per block: the window in the image with the mean over the heads, the same enlarged, and
    individual heads. A frame marks the query, a dotted line the border between map and padding.

    Args:
        inferencer (Inferencer): The model, not folded.
        image (Picture): The image.
        query (tuple[float, float]): See :func:`attention_of`. Defaults to the middle.
        block (str, optional): See :func:`attention_of`. Defaults to None.
        boxes (np.ndarray, optional): (N, 4) boxes of people, for pose; the first is used.

    Returns:
        np.ndarray: The picture, (H, W, 3) uint8, RGB.
    """
    found = attention_of(inferencer, image, query, block, boxes)
    _, pixels = first_input(inferencer, image, boxes)
    heads = min(HEADS_SHOWN, max(len(one.weights) for one in found))
    figure, axes = _panels(len(found), heads + 2, pixels.shape, titled_rows=len(found))
    for row, one in zip(axes, found):
        _draw_window(row[0], pixels, one)
        panels = [('mean of heads', one.weights.mean(0))]
        panels += [(f'head {i + 1}', weights) for i, weights in enumerate(one.weights[:heads])]
        for axis, (title, weights) in zip(row[1:], panels):
            axis.imshow(weights, COLORS, vmin=0, interpolation='nearest')
            axis.set_title(f'{title}\nup to {weights.max():.2f}')
            y, x = one.query
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec='cyan', lw=1.5))
            _frame_map(axis, one)
        for axis in row[1 + len(panels) :]:
            axis.set_visible(False)
    figure.suptitle('Attention of one position (framed) to its window; dotted: border to padding')
    return _render(figure)


def _draw_window(axis: Axes, pixels: np.ndarray, one: Attention) -> None:
    """Draw the image, dimmed outside the window, and the attention in it."""
    height, width = pixels.shape[:2]
    left, top, across, down = np.multiply(one.window, (width, height, width, height))
    axis.imshow(pixels // 2 + 64)
    mean = one.weights.mean(0)
    extent = (left, left + across, top + down, top)
    axis.imshow(mean, COLORS, vmin=0, alpha=0.75, interpolation='nearest', extent=extent)
    axis.add_patch(Rectangle((left, top), across, down, fill=False, ec='white', lw=1.5))
    cell = across / mean.shape[1], down / mean.shape[0]
    corner = left + one.query[1] * cell[0], top + one.query[0] * cell[1]
    axis.add_patch(Rectangle(corner, *cell, fill=False, ec='cyan', lw=1.5))
    axis.set_facecolor('0.8')  # padded windows extend over the border
    axis.set_xlim(min(0, left), max(width, left + across))
    axis.set_ylim(max(height, top + down), min(0, top))
    side = mean.shape[0]
    axis.set_title(f'{one.block}\nmap {one.size[0]} x {one.size[1]}, window {side} x {side}')


def _frame_map(axis: Axes, one: Attention) -> None:
    """Draw a dotted line between the map and padding, if it is in the window."""
    (height, width), (left, top) = one.size, one.window[:2]
    corner = -0.5 - left * width, -0.5 - top * height
    axis.add_patch(Rectangle(corner, width, height, fill=False, ec='white', lw=1.5, ls=':'))


def _overlay(axis: Axes, pixels: np.ndarray, values: np.ndarray) -> None:
    """Draw a map over the gray image, which shows through where the map is dark."""
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    extent = (0, gray.shape[1], gray.shape[0], 0)
    axis.imshow(gray, 'gray', vmin=0, vmax=255)
    alpha = 0.15 + 0.55 * values
    axis.imshow(values, COLORS, alpha=alpha, interpolation='nearest', extent=extent)


def _panels(
    rows: int, columns: int, shape: Sequence[int], titled_rows: int
) -> tuple[Figure, np.ndarray]:
    """A figure with panels of about the aspect ratio of the image."""
    ratio = float(np.clip(shape[0] / shape[1], 0.4, 1.6))
    size = (PANEL * columns, (PANEL * ratio + 0.05) * rows + TITLE * titled_rows + TITLE)
    figure = Figure(figsize=size, dpi=DPI, layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.title.set_fontsize(8)
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05)
    return figure, axes


def _render(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
