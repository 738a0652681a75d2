"""Export of trained models to ONNX files, which are written only if they match torch."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.onnx.errors import OnnxExporterError

from ..checkpoints.writing import check_destination
from ..datasets.meta import augmented_tests
from ..models.checks import MIN_INPUT
from ..models.hrformer import HRFormer
from ..utils.files import write_atomically
from ..version import __version__
from .aligned_conv import align_channels
from .exchange import use_channels_last
from .fuse import FusedDWConvFFN, FusedWindowAttention, fold_batch_norm
from .map_attention import use_map_attention

# Framework class that a model inherits from -> its task.
TASKS = {
    'BaseClassifier': 'classification',
    'TopdownPoseEstimator': 'pose',
    'EncoderDecoder': 'segmentation',
}
# Task -> attribute of a model with the number of its classes or keypoints.
COUNTS = {
    'classification': 'head.num_classes',
    'pose': 'head.out_channels',
    'segmentation': 'num_classes',
}
INPUT = 'image'
# Task -> name of the output, and names of its dynamic axes.
OUTPUTS = {
    'classification': ('scores', {}),
    'pose': ('heatmaps', {2: 'heatmap_height', 3: 'heatmap_width'}),
    'segmentation': ('logits', {2: 'height', 3: 'width'}),
}
# Task -> number of axes of the output.
AXES = {'classification': 2, 'pose': 4, 'segmentation': 4}
# The latest that torch 2.1 writes is 17; scaled_dot_product_attention and Trilu need 14.
OPSETS = range(14, 18)
# The exporter based on TorchScript; torch 2.9 and later default to one that needs another package.
HAS_CHOICE = 'dynamo' in inspect.signature(torch.onnx.export).parameters
EXPORTER = dict(dynamo=False) if HAS_CHOICE else {}
TOLERANCE = 1e-4  # of the range of the output
# For dynamic sizes, trace a size that needs every step that any size needs: the streams are 17x9,
# 9x5, 5x3 and 3x2, and halving odd sizes rounds up, which enlarging has to correct.
TRACED_SIZE = (68, 36)
TRACED_BATCH = 2  # 1 might be treated as a broadcast axis
OTHER_SIZES = ((97, 161), (64, 224))
BATCHES = (1, 3)


class ExportError(RuntimeError):
    """A model could not be exported, or not with the same results as in torch."""


@dataclass(frozen=True)
class Comparison:
    """Difference between onnxruntime and torch on one batch of noise.

    Attributes:
        batch (int): Number of images.
        size (tuple[int, int]): Their height and width.
        error (float): Largest absolute difference.
        range (float): Range (maximum minus minimum) of the output of torch.
    """

    batch: int
    size: tuple[int, int]
    error: float
    range: float

    @property
    def good(self) -> bool:
        """Whether the difference is within :data:`TOLERANCE` of the range."""
        return self.error <= TOLERANCE * self.range  # False for NaN

    def __str__(self) -> str:
        size = f'{self.size[0]}x{self.size[1]}'
        relative = self.error / self.range if self.range else float('nan')
        return f'{self.batch:>5}  {size:>9}  {self.error:>9.2e}  {self.range:>9.2e}  {relative:.2e}'


HEADER = f'{"batch":>5}  {"size":>9}  {"max error":>9}  {"range":>9}  error / range'


class DeployedModel(nn.Module):
    """A model as it is deployed: from one image tensor to one output tensor.

    Args:
        model (nn.Module): A classifier, pose estimator or segmentor with an HRFormer backbone.
        with_normalization (bool): Whether it takes pixels from 0 to 255 and normalizes them itself.
            Defaults to False.

    Raises:
        ValueError: If the task of the model is not supported.

    Examples:
        >>> from mmhrformer import get_model
        >>> deployed = DeployedModel(get_model('hrformer-tiny_8xb128_in1k'))
        >>> deployed(torch.rand(1, 3, 64, 64)).sum()  # doctest: +SKIP
        tensor(1.0000)
    """

    def __init__(self, model: nn.Module, with_normalization: bool = False) -> None:
        super().__init__()
        self.task = task_of(model)
        self.model = model
        self.with_normalization = with_normalization
        if with_normalization:
            mean, std = normalization(model)
            self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1))
            self.register_buffer('std', torch.tensor(std).view(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Predict.

        Args:
            image (Tensor): Images of shape (B, 3, H, W).

        Returns:
            Tensor: Probabilities of shape (B, classes), heatmaps of shape (B, keypoints, H / 4,
            W / 4), or logits of shape (B, classes, H, W); (B, 1, H, W) for a binary segmentor with
            one channel, where the sigmoid of the logit is compared with a threshold.

        Raises:
            ValueError: If the model returns something else.
        """
        if self.with_normalization:
            image = (image - self.mean) / self.std
        out = self.model(image, None, mode='tensor')
        if not isinstance(out, Tensor) or out.dim() != AXES[self.task]:
            found = 'several tensors'
            if isinstance(out, Tensor):
                found = f'shape {tuple(map(int, out.shape))}'
            head = getattr(self.model, 'head', None)
            raise ValueError(
                f'model.head is a {type(head).__name__}, which returns {found}, not '
                f'{OUTPUTS[self.task][0]} with {AXES[self.task]} axes: it cannot be exported'
            )
        if self.task == 'classification':
            return out.softmax(-1)
        if self.task == 'segmentation':
            align = self.model.align_corners
            return F.interpolate(out, image.shape[-2:], mode='bilinear', align_corners=align)
        return out


def task_of(model: nn.Module) -> str:
    """Find the task of a model.

    Args:
        model (nn.Module): A model of one of the three frameworks.

    Returns:
        str: A value of :data:`TASKS`.

    Raises:
        ValueError: If the model is of another kind.
    """
    names = {kind.__name__ for kind in type(model).__mro__}
    if 'BaseTTAModel' in names:
        raise ValueError(
            f'model is a {type(model).__name__}: test-time augmentation runs a model several times '
            'and cannot be exported; export its .module instead'
        )
    for name, task in TASKS.items():
        if name in names:
            return task
    raise ValueError(
        f'model is a {type(model).__name__}, whose task is not supported: expected a classifier '
        'of mmpretrain, a TopdownPoseEstimator of mmpose or an EncoderDecoder of mmseg'
    )


def number_of_outputs(model: nn.Module) -> int | None:
    """Number of classes or keypoints of a model, which may have names; None if unknown."""
    number = reduce(
        lambda part, name: getattr(part, name, None), COUNTS[task_of(model)].split('.'), model
    )
    decoder = getattr(getattr(model, 'head', None), 'decoder', None)
    # Combined heatmaps of mmpose are a map and two offsets per keypoint.
    return number // 3 if getattr(decoder, 'heatmap_type', '') == 'combined' else number


def normalization(model: nn.Module) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in the channel order of the model."""
    preprocessor = model.data_preprocessor
    if not getattr(preprocessor, '_enable_normalize', False):
        channels = model.backbone.in_channels
        return [0.0] * channels, [1.0] * channels
    return preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist()


def channel_order(model: nn.Module) -> str:
    """Channel order of a model's input: ``'RGB'``, or ``'BGR'`` as OpenCV and mmcv read images."""
    # The attribute's name in mmpretrain, mmseg and mmengine (mmpose).
    names = ('to_rgb', 'channel_conversion', '_channel_conversion')
    converts = any(getattr(model.data_preprocessor, name, False) for name in names)
    return 'RGB' if converts else 'BGR'


def refuse_tta(cfg: Config) -> None:
    """Raise a ValueError for a config with test-time augmentation."""
    if kind := augmented_tests(cfg):
        raise ValueError(
            f'the config has {kind}: test-time augmentation runs a model several times and '
            'cannot be exported; use the config that the model was trained with'
        )


@dataclass(frozen=True)
class ExportOptions:
    """Options of :func:`export_onnx`.

    Attributes:
        size (Sequence[int]): Height and width of the images, in pixels; with dynamic sizes, one of
            the sizes to verify. Defaults to (224, 224).
        batch (int, optional): Number of images. Defaults to None: any number.
        dynamic_size (bool, optional): Whether the file takes images of any size. Defaults to None:
            only for segmentation.
        opset (int): ONNX operator set version, 14 to 17. Defaults to 17.
        with_normalization (bool): Whether the file takes pixels from 0 to 255, in the channel order
            of the model, and normalizes them itself. Defaults to False.
        simplify (bool): Whether to simplify the graph. Defaults to True.
        verify (bool): Whether to compare with torch. Defaults to True.
        names (Sequence[str]): Names of the classes or keypoints, stored in the file.
        flip_indices (Sequence[int]): For each keypoint the one that it swaps with in a mirror
            image, stored in the file.
        overwrite (bool): Whether the file may exist. Defaults to False.
    """

    size: Sequence[int] = (224, 224)
    batch: int | None = None
    dynamic_size: bool | None = None
    opset: int = OPSETS[-1]
    with_normalization: bool = False
    simplify: bool = True
    verify: bool = True
    names: Sequence[str] = ()
    flip_indices: Sequence[int] = ()
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Validate the numbers."""
        if len(self.size) != 2 or min(self.size) < MIN_INPUT:
            raise ValueError(
                f'size={tuple(self.size)}: expected height and width of at least {MIN_INPUT} pixels'
            )
        if self.batch is not None and self.batch < 1:
            raise ValueError(f'batch={self.batch}: expected a positive integer, or None for any')
        if self.opset not in OPSETS:
            raise ValueError(f'opset={self.opset}: expected {OPSETS[0]} to {OPSETS[-1]}')


def export_onnx(model: nn.Module, file: str | Path, *args, **kwargs) -> list[Comparison]:
    """Export a model to an ONNX file.

    Batch normalization is folded into the convolutions. The file is checked by onnx, simplified by
    onnxslim and compared with the model in onnxruntime; it is written only if all that succeeds.

    Args:
        model (nn.Module): A classifier, pose estimator or segmentor with an HRFormer backbone, in
            evaluation mode and float32. It is not changed.
        file (str | Path): File to write; its name must end in ``.onnx``.
        *args: See :class:`ExportOptions`.
        **kwargs: See :class:`ExportOptions`.

    Returns:
        list[Comparison]: The comparisons with torch.

    Raises:
        ExportError: If torch cannot export an operator, or if the output of onnxruntime differs by
            more than 1e-4 of its range.
        FileExistsError: If the file exists and ``overwrite`` is not set.
        ImportError: If onnx, onnxruntime or onnxslim is needed and missing.
        ValueError: If the model is not supported, or an argument is invalid.

    Examples:
        >>> model = get_model('hrformer-tiny_8xb128_in1k', 'tiny.pth')  # doctest: +SKIP
        >>> for row in export_onnx(model, 'tiny.onnx'):  # doctest: +SKIP
        ...     print(row)
    """
    options = ExportOptions(*args, **kwargs)
    require_packages(options.simplify, options.verify)
    path = _check_file(file, options.overwrite)
    graph, comparisons = _make_graph(model, options)
    write_atomically(path, graph.SerializeToString())
    return comparisons


def _make_graph(model: nn.Module, options: ExportOptions):
    """Trace, simplify and compare a model; return the graph and the comparisons."""
    task = _check_model(model)
    _check_lengths(model, names=options.names, flip_indices=options.flip_indices)
    if options.dynamic_size is None:
        options = replace(options, dynamic_size=task == 'segmentation')
    model = copy.deepcopy(model).cpu()
    reference = DeployedModel(model, options.with_normalization).eval()
    # The reference is not folded, so that the comparison also covers the folding.
    prepared = prepare_for_export(model, fixed_size=not options.dynamic_size)
    deployed = DeployedModel(prepared, options.with_normalization).eval()
    _log_step(f'Tracing the {task} model')
    graph = trace(deployed, options)
    _add_metadata(graph, deployed, options)
    return _choose(graph, options.simplify, reference, _cases(options) if options.verify else [])


@torch.no_grad()
def prepare_for_export(model: nn.Module, fixed_size: bool = False) -> nn.Module:
    """Fold batch normalization, and replace attention, FFN and exchange by modules for export.

    Args:
        model (nn.Module): A model in evaluation mode. It is not changed.
        fixed_size (bool): Whether the file is for images of one size, which is faster. Defaults
            to False.

    Returns:
        nn.Module: A copy without gradients.
    """
    model = use_channels_last(fold_batch_norm(copy.deepcopy(model)))
    return align_channels(use_map_attention(model, fixed_size)).requires_grad_(False)


def require_packages(simplify: bool = True, verify: bool = True) -> None:
    """Check that the packages for an export are installed, before any work is done.

    Args:
        simplify (bool): Whether onnxslim is needed. Defaults to True.
        verify (bool): Whether onnxruntime is needed. Defaults to True.

    Raises:
        ImportError: If a package is missing.
    """
    needed = ['onnx'] + ['onnxruntime'] * verify + ['onnxslim'] * simplify
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'export needs {", ".join(missing)}: pip install onnx onnxruntime onnxslim'
        )


def _check_file(file: str | Path, overwrite: bool) -> Path:
    if Path(file).suffix != '.onnx':
        raise ValueError(f'file={str(file)!r}: expected a name that ends in .onnx')
    return check_destination(file, overwrite)


def _check_model(model: nn.Module) -> str:
    """Refuse models that cannot be exported faithfully; return the task."""
    task = task_of(model)
    if model.training:
        raise ValueError('model is in training mode: call model.train(False) before the export')
    if not isinstance(model.backbone, HRFormer):
        raise ValueError(
            f'model.backbone is a {type(model.backbone).__name__}: only models with the backbone '
            "mmhrformer.HRFormer can be exported; export others with their framework's tools"
        )
    folded = (FusedWindowAttention, FusedDWConvFFN)
    if any(isinstance(module, folded) for module in model.modules()):
        raise ValueError(
            'model was made by fuse_for_inference for torch: export the model it was made from; '
            'the export folds it as needed'
        )
    head = getattr(model, 'head', None)
    if any(kind.__name__ == 'MultiLabelClsHead' for kind in type(head).__mro__):
        raise ValueError(
            f'model.head is a {type(head).__name__}: only classifiers with one label per image can '
            'be exported, whose probabilities are a softmax'
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(
            f'model has weights of {", ".join(map(str, dtypes))}: call model.float(), and select '
            'another precision in the runtime (trtexec --fp16)'
        )
    return task


def _check_lengths(model: nn.Module, **lists: Sequence) -> None:
    """Refuse lists, by argument name, that do not have an entry per class or keypoint."""
    number = number_of_outputs(model)
    for name, entries in lists.items():
        if entries and number is not None and len(entries) != number:
            raise ValueError(
                f'{name} has {len(entries)} entries, such as {entries[0]!r}, but the model has '
                f'{number} classes or keypoints: pass one entry for each, or none'
            )


def trace(deployed: DeployedModel, options: ExportOptions):
    """Trace a forward pass to an ONNX graph, an ``onnx.ModelProto``."""
    import onnx

    name, sides = OUTPUTS[deployed.task]
    open_input, open_output = {}, {}
    if options.batch is None:
        open_input[0] = open_output[0] = 'batch'
    if options.dynamic_size:
        open_input |= {2: 'height', 3: 'width'}
        open_output |= sides
    size = TRACED_SIZE if options.dynamic_size else options.size
    image = torch.rand(options.batch or TRACED_BATCH, deployed.model.backbone.in_channels, *size)
    arguments = dict(opset_version=options.opset, input_names=[INPUT], output_names=[name])
    arguments['dynamic_axes'] = {INPUT: open_input, name: open_output}
    content = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # Warnings about constant numbers of channels, and about the legacy exporter.
        warnings.simplefilter('ignore')
        try:
            torch.onnx.export(deployed, (image,), content, **arguments, **EXPORTER)
        except OnnxExporterError as err:
            reason = str(err).partition('Please feel free')[0].strip()
            raise ExportError(
                f'torch {torch.__version__} cannot export this model: {reason} Replace the part of '
                'the head or neck that uses this operator'
            ) from err
    return onnx.load_from_string(content.getvalue())


def describe(model: nn.Module) -> dict[str, str]:
    """Describe input and output of a model, as metadata of its exported file.

    Args:
        model (nn.Module): A model of one of the three tasks.

    Returns:
        dict[str, str]: Text or JSON by key.
    """
    mean, std = normalization(model)
    entries = dict(
        task=task_of(model),
        input_mean=json.dumps(mean),
        input_std=json.dumps(std),
        channel_order=channel_order(model),
    )
    if entries['task'] == 'pose':
        decoder = model.head.decoder
        entries['decoder'] = type(decoder).__name__
        if getattr(decoder, 'unbiased', False):
            entries['decoder'] += ' (unbiased)'
    if getattr(model, 'out_channels', None) == 1:  # a binary segmentor
        entries['threshold'] = json.dumps(model.decode_head.threshold)
    return entries


def _add_metadata(graph, deployed: DeployedModel, options: ExportOptions) -> None:
    """Add a description of the model to the metadata of a graph."""
    import onnx

    entries = dict(
        describe(deployed.model),
        mmhrformer_version=__version__,
        normalization='included' if deployed.with_normalization else 'expected',
        names=json.dumps(list(options.names)),
    )
    if deployed.task == 'pose':
        entries['flip_indices'] = json.dumps(list(options.flip_indices))
        test_cfg = deployed.model.test_cfg or {}
        entries['shift_heatmap'] = json.dumps(bool(test_cfg.get('shift_heatmap')))
    onnx.helper.set_model_props(graph, entries)
    graph.producer_name, graph.producer_version = 'mmhrformer', __version__


def _cases(options: ExportOptions) -> list[tuple[int, tuple[int, int]]]:
    """Batches and sizes to compare: the requested one, and others if dynamic."""
    batches = BATCHES if options.batch is None else (options.batch,)
    if not options.dynamic_size:
        return [(batch, tuple(options.size)) for batch in batches]
    others = [(batch, size) for size in OTHER_SIZES for batch in batches]
    return [(batches[0], tuple(options.size)), *others]


def _choose(graph, simplify: bool, reference: DeployedModel, cases: Sequence[tuple]):
    """Simplify, check and compare; keep the traced graph if the simplified one is wrong."""
    import onnx

    if cases:
        _log_step(f'Running torch on {len(cases)} batches of noise')
    expected = [(batch, size, *_run_torch(reference, batch, size)) for batch, size in cases]
    if simplify:
        import onnxslim

        _log_step(f'Simplifying a graph of {len(graph.graph.node)} nodes')
        try:
            simplified = onnxslim.slim(copy.deepcopy(graph))
            onnx.checker.check_model(simplified, full_check=True)
            comparisons = compare(simplified, expected)
        except Exception as err:  # any failure leaves the traced graph
            warnings.warn(f'not simplified, onnxslim failed: {err}', stacklevel=3)
        else:
            if all(comparison.good for comparison in comparisons):
                return simplified, comparisons
            warnings.warn('not simplified, onnxslim changed the results', stacklevel=3)
    onnx.checker.check_model(graph, full_check=True)
    comparisons = compare(graph, expected)
    if not all(comparison.good for comparison in comparisons):
        rows = '\n'.join(map(str, comparisons))
        raise ExportError(
            f'onnxruntime differs from torch by more than {TOLERANCE:.0e} of the range of the '
            f'output, so nothing was written:\n{HEADER}\n{rows}\n'
            'Report this with your config, or use verify=False (--no-verify) to write it anyway'
        )
    return graph, comparisons


def _log_step(step: str) -> None:
    """Log the beginning of a step, which may take seconds to minutes."""
    print_log(f'{step} ...', 'current')


def _run_torch(deployed: DeployedModel, batch: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Generate a batch of noise, and compute the output of torch for it."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, deployed.model.backbone.in_channels, *size)
    image = torch.randn(shape, generator=generator)
    if deployed.with_normalization:
        image = torch.rand(shape, generator=generator) * 255
    with torch.no_grad():
        return image, deployed(image)


def compare(graph, expected: Sequence[tuple[int, tuple, Tensor, Tensor]]) -> list[Comparison]:
    """Compare onnxruntime with torch on cases of (batch, size, images, outputs of torch)."""
    if not expected:
        return []
    _log_step('Comparing onnxruntime with torch')
    session = open_session(graph.SerializeToString())
    comparisons = []
    for batch, size, image, reference in expected:
        out = torch.from_numpy(session.run(None, {INPUT: image.numpy()})[0])
        if out.shape != reference.shape:
            raise ExportError(
                f'onnxruntime returns shape {tuple(out.shape)} for {batch} images of {size}, '
                f'torch {tuple(reference.shape)}'
            )
        error, spread = (out - reference).abs().max(), reference.max() - reference.min()
        comparisons.append(Comparison(batch, size, error.item(), spread.item()))
    return comparisons


def open_session(graph: bytes | str):
    """Open a graph or a file in onnxruntime, with as many threads as torch uses.

    Args:
        graph (bytes | str): The serialized graph, or the path of a file.

    Returns:
        onnxruntime.InferenceSession: The session, on the CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])
