"""Maps cut into windows and put together again."""

from __future__ import annotations

import pytest
import torch

from mmhrformer.ops import window_merge, window_padding, window_partition
from mmhrformer.ops.windows import relative_position_index


@pytest.mark.parametrize('window', [1, 2, 3, 7])
@pytest.mark.parametrize('size', [(1, 1), (7, 7), (8, 5), (14, 21), (2, 15), (16, 12)])
def test_merge_undoes_partition(size, window):
    x = torch.rand(2, *size, 3)
    windows = window_partition(x, window)
    rows, cols = -(-size[0] // window), -(-size[1] // window)
    assert windows.shape == (2 * rows * cols, window * window, 3)
    assert torch.equal(window_merge(windows, window, size), x)


def test_windows_and_their_tokens_are_in_row_major_order():
    x = torch.arange(16).view(1, 4, 4, 1)
    assert window_partition(x, 2).squeeze(-1).tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


@pytest.mark.parametrize(
    ('size', 'window', 'padding'),
    [(7, 7, (0, 0)), (8, 7, (3, 3)), (6, 7, (0, 1)), (5, 7, (1, 1)), (1, 4, (1, 2))],
)
def test_padding_is_centered_and_the_odd_token_goes_last(size, window, padding):
    assert window_padding(size, window) == padding
    tokens = window_partition(torch.ones(1, size, window, 1), window).view(-1, window)[:, 0]
    assert tokens.tolist() == [0] * padding[0] + [1] * size + [0] * padding[1]


def test_relative_position_index_of_window_7():
    index = relative_position_index(7)
    assert index.shape == (49, 49)
    assert index[0, :3].tolist() == [84, 83, 82]
    assert index[48, 0] == 168
    assert index[0, 48] == 0


@pytest.mark.parametrize('window', [1, 2, 7, 15])
def test_relative_position_index_equals_the_formula_of_swin_in_openmmlab(window):
    steps = torch.arange(window)
    coords = ((2 * window - 1) * steps[:, None] + steps).view(1, -1)
    assert torch.equal(relative_position_index(window), (coords + coords.T).flip(1))
