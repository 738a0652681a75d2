"""Exported files as replacements for the networks of torch models, run by onnxruntime."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn

from .onnx import COUNTS, INPUT, describe, open_session

# Task -> attribute of a model with the number of channels of its output.
CHANNELS = {**COUNTS, 'segmentation': 'out_channels'}


class ExportedNetwork(nn.Module):
    """A module that runs a file written by :func:`export_onnx` in onnxruntime, on the CPU.

    Args:
        file (str | Path): The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If onnxruntime is not installed.
        ValueError: If the file was not written by :func:`export_onnx`.

    Examples:
        >>> network = ExportedNetwork('pose.onnx')  # doctest: +SKIP
        >>> network(torch.rand(1, 3, 256, 192)).shape  # doctest: +SKIP
        torch.Size([1, 17, 64, 48])
    """

    def __init__(self, file: str | Path) -> None:
        super().__init__()
        self.file = str(file)
        if not Path(file).is_file():
            raise FileNotFoundError(f'{self.file}: there is no such file')
        advice = 'write the file with python -m mmhrformer export_onnx'
        try:
            self.session = open_session(self.file)
        except ImportError as err:
            raise ImportError(f'{self.file}: to run it, pip install onnxruntime') from err
        except Exception as err:  # onnxruntime has many error classes
            raise ValueError(f'{self.file}: onnxruntime cannot read it ({err}); {advice}') from err
        self.facts = self.session.get_modelmeta().custom_metadata_map
        if 'task' not in self.facts:
            raise ValueError(f'{self.file} does not say what it is for; {advice}')
        self.shape = self.session.get_inputs()[0].shape  # names for open sizes
        self.channels = self.session.get_outputs()[0].shape[1]

    def forward(self, image: Tensor) -> Tensor:
        """Compute the file's output for normalized images (B, C, H, W), see docs/export.md.

        Raises:
            ValueError: If the file takes images of another shape.
        """
        for fixed, size in zip(self.shape, image.shape):
            if isinstance(fixed, int) and fixed != size:
                raise ValueError(
                    f'{self.file} takes images of shape {tuple(self.shape)}, not '
                    f'{tuple(image.shape)}: export it for this shape (--batch, --size), or for '
                    'any shape (--batch dynamic, --dynamic-size)'
                )
        if self.facts['normalization'] == 'included':  # back to pixels of 0 to 255
            mean, std = (
                image.new_tensor(json.loads(self.facts[key])).view(-1, 1, 1)
                for key in ('input_mean', 'input_std')
            )
            image = image * std + mean
        (out,) = self.session.run(None, {INPUT: image.numpy()})
        return torch.from_numpy(out)


def run_exported(model: nn.Module, file: str | Path) -> nn.Module:
    """Replace the network of a model by an exported one, keeping its pre- and post-processing.

    Args:
        model (nn.Module): A classifier, pose estimator or segmentor built from the config that the
            file was exported with; its weights do not matter. It is changed in place.
        file (str | Path): A file written by :func:`export_onnx`.

    Returns:
        nn.Module: The model. Its ``dataset_meta`` has the class names from the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If onnxruntime is not installed.
        ValueError: If the file was exported from another kind of model.

    Examples:
        >>> model = get_model('hrformer-tiny_8xb128_in1k')  # doctest: +SKIP
        >>> run_exported(model, 'tiny.onnx').predict(images)  # doctest: +SKIP
    """
    network = ExportedNetwork(file)
    _check_fit(model, network)
    task, names = network.facts['task'], json.loads(network.facts['names'])
    model.backbone, model.neck = network, None
    if task == 'segmentation':  # whole images, or window by window
        model.encode_decode = lambda images, metas: network(images)
    else:  # the classification head applies softmax again: softmax(log(p)) = p
        model.head.forward = torch.log if task == 'classification' else lambda heatmaps: heatmaps
    model.dataset_meta = dict(classes=names) if names and task != 'pose' else {}
    return model


def _check_fit(model: nn.Module, network: ExportedNetwork) -> None:
    """Refuse a file that was exported from another kind of model, or for other input."""
    expected = describe(model)
    found = {key: network.facts.get(key) for key in expected}
    # With open sizes, the number of channels may be a name in a file that was not simplified.
    if found['task'] == expected['task'] and isinstance(network.channels, int):
        found['channels'] = network.channels
        expected['channels'] = attrgetter(CHANNELS[expected['task']])(model)
    for key, value in expected.items():
        if found[key] != value:
            raise ValueError(
                f'{network.file} has {key}={found[key]}, but the config has {key}={value}: use the '
                'config that the file was exported with'
            )
