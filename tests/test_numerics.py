"""Half precision, deterministic mode and extreme inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from mmengine.structures import PixelData
from needs import needs
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

import mmhrformer
from mmhrformer import (
    HRFormer,
    HRFormerFusion,
    LocalWindowSelfAttention,
    OHEMCrossEntropyLoss,
    WeightedCrossEntropyLoss,
    fuse_for_inference,
)
from mmhrformer.ops import norm_gelu_conv

CHANNELS = (8, 16, 24, 32)
MICRO = dict(channels=CHANNELS, num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
# The backbones as the configs of the tasks build them.
TASKS = {
    'cls': dict(upsample='nearest'),
    'pose': dict(upsample='bilinear', out_indices=(0,)),
    'seg': dict(upsample='nearest', window_size=5),
}
BF16 = torch.autocast('cpu', torch.bfloat16)


def make_backbone(task: str = 'cls', counted: bool = False) -> HRFormer:
    """A micro backbone; with the statistics of some images if they are to be counted."""
    torch.manual_seed(0)
    model = HRFormer(arch=MICRO, **TASKS[task])
    # Truncated normal numbers are other ones in each torch, and errors depend on the weights.
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, LocalWindowSelfAttention):
            nn.init.normal_(module.relative_position_bias_table, std=0.02)
    if counted:
        for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
            norm.momentum = 1.0
        with torch.no_grad():
            model(make_images(8))
    return model.eval()


def make_images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# Half precision


def distances(model: nn.Module) -> Iterator[tuple[float, float]]:
    """Largest and root mean square error of bfloat16 for each stream, in parts of its range."""
    x = make_images()
    with torch.no_grad():
        expected = model(x)
        with BF16:
            outs = model(x)
    for out, full in zip(outs, expected, strict=True):
        error, span = out.float() - full, full.max() - full.min()
        assert span > 0.1
        yield (error.abs().max() / span).item(), (error.square().mean().sqrt() / span).item()


@pytest.mark.parametrize('fused', [False, True], ids=['plain', 'fused'])
@pytest.mark.parametrize('task', TASKS)
def test_bfloat16_is_close_to_float32(task, fused):
    model = make_backbone(task)
    model = fuse_for_inference(model) if fused else model
    largest, mean = (max(values) for values in zip(*distances(model)))
    assert mean < 0.005
    assert largest < 0.02


def test_folded_convolutions_follow_autocast():
    ffn = next(m for m in fuse_for_inference(make_backbone()).modules() if hasattr(m, 'dw3x3'))
    x = torch.randn(1, 7, 7, ffn.fc1.in_channels)
    with torch.no_grad():
        assert ffn(x).dtype == torch.float32
        with BF16:
            assert ffn(x).dtype == torch.bfloat16


@pytest.mark.parametrize('task', TASKS)
def test_bfloat16_is_close_to_float32_with_statistics_of_the_data(task):
    """Random weights make small maps, which are then normalized, and with them their errors.

    Single values are up to 8 % of the range off, most of it from rounding in the stem, and the root
    mean square is 1 to 2 %. Another order of magnitude would be a fault.
    """
    assert max(mean for _, mean in distances(make_backbone(task, counted=True))) < 0.03


class Seen(TorchDispatchMode):
    """Records the data types of the floating point tensors that operations get and give."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, set[tuple[torch.dtype, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = (*args, *(out if isinstance(out, tuple) else (out,)))
        dtypes = tuple(
            t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()
        )
        self.types.setdefault(func.overloadpacket.__name__, set()).add(dtypes)
        return out


@pytest.mark.parametrize('training', [False, True])
def test_statistics_are_float32_under_autocast(training):
    model = make_backbone().train(training)
    with BF16, Seen() as seen:
        model(make_images())
    full = torch.float32
    for types in seen.types['native_layer_norm']:  # input, scale, shift; output, mean, deviation
        assert (*types[1:3], *types[4:]) == (full,) * 4
    for types in seen.types['native_batch_norm']:  # the same with two running statistics before
        assert (*types[1:5], *types[6:]) == (full,) * 6
    for norm in (m for m in model.modules() if isinstance(m, (_BatchNorm, nn.LayerNorm))):
        assert not [k for k, t in norm.state_dict().items() if t.dtype == torch.bfloat16]


@pytest.mark.parametrize('grad', [False, True])
def test_softmax_is_summed_up_in_float32_under_autocast(grad):
    """In bfloat16 256 + 1 is 256: of 1024 equal logits each would get 1/256."""
    attn = LocalWindowSelfAttention(8, 1, window_size=32, with_rpe=False)
    nn.init.zeros_(attn.qkv.weight)
    nn.init.ones_(attn.qkv.bias)
    nn.init.eye_(attn.proj.weight)
    with torch.set_grad_enabled(grad), BF16:
        out = attn(torch.rand(1, 32, 32, 8)) - attn.proj.bias
    torch.testing.assert_close(out.detach().float(), torch.ones(1, 32, 32, 8), atol=0.01, rtol=0)


@pytest.mark.parametrize('kind', ['batch', 'layer'])
def test_statistics_are_summed_up_in_float32_under_autocast(kind):
    torch.manual_seed(0)
    x = (3 + torch.randn(4, 64, 32, 32)).bfloat16()
    if kind == 'layer':
        with BF16:
            out = nn.LayerNorm(64 * 32 * 32, eps=1e-6)(x.flatten(1))
        mean, var = out.float().mean(1), out.float().var(1)
        torch.testing.assert_close(mean, torch.zeros(4), atol=2e-3, rtol=0)
        torch.testing.assert_close(var, torch.ones(4), atol=1e-2, rtol=0)
        return
    norm = nn.BatchNorm2d(64, momentum=1.0)
    with BF16:
        norm_gelu_conv(x.requires_grad_(), norm)
    torch.testing.assert_close(norm.running_mean, x.float().mean((0, 2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm.running_var, x.float().var((0, 2, 3)), atol=1e-3, rtol=0)


class Classifier(nn.Module):
    """Backbone, neck and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = HRFormer(arch=MICRO, drop_path_rate=0.1)
        self.neck = HRFormerFusion(CHANNELS, (4, 4, 8, 8), 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        [fused] = self.neck(self.backbone(x))
        return nn.functional.cross_entropy(self.fc(fused.mean((2, 3))), label)


@pytest.mark.slow
def test_training_in_bfloat16_stays_finite():
    """200 steps on noise, as large a learning rate as in the recipes."""
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for _ in range(200):
        with BF16:
            loss = model(make_images(4, 32), torch.randint(10, (4,)))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append((loss.item(), norm.item()))
    assert torch.tensor(losses).isfinite().all()
    assert [k for k, t in model.state_dict().items() if not t.isfinite().all()] == []


# Deterministic mode


class Segmentor(nn.Module):
    """Backbone and the two heads, with their losses, as CascadeEncoderDecoder runs them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        common = dict(in_channels=CHANNELS, in_index=(0, 1, 2, 3), channels=16, num_classes=5)
        common.update(input_transform='resize_concat')
        ohem = dict(type='mmhrformer.OHEMCrossEntropyLoss', min_kept=1000)
        self.backbone = HRFormer(arch=MICRO, drop_path_rate=0.1)
        self.aux = mmhrformer.OCRAuxHead(loss_decode=ohem, **common)
        self.ocr = mmhrformer.OCRHead(ocr_channels=8, loss_decode=ohem, **common)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        streams = self.backbone(x)
        from mmseg.structures import SegDataSample

        samples = [SegDataSample(gt_sem_seg=PixelData(data=one[None])) for one in label]
        losses = self.aux.loss(streams, samples, None)
        logits = self.aux(streams)
        more = self.ocr.loss(streams, logits, samples, None)
        return losses['loss_ohem'] + more['loss_ohem']


def step(kind: type[nn.Module], labels: tuple[int, ...]) -> dict[str, Tensor]:
    """One training step; what it leaves behind."""
    model = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(make_images(), torch.randint(5, labels))
    loss.backward()
    optimizer.step()
    grads = {f'{name}.grad': p.grad for name, p in model.named_parameters()}
    return {'loss': loss.detach(), **model.state_dict(), **grads}


@pytest.mark.parametrize(
    ('kind', 'labels'),
    [
        pytest.param(Classifier, (2,), id='neck'),
        pytest.param(Segmentor, (2, 64, 64), id='OCR', marks=needs('mmseg')),
    ],
)
def test_training_step_is_deterministic(kind, labels):
    with deterministic():
        first, second = step(kind, labels), step(kind, labels)
    assert first['loss'].isfinite()
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    assert differing == []


# Extreme inputs

EXTREMES = {
    'zeros': lambda x: torch.zeros_like(x),
    'black': lambda x: torch.full_like(x, -2.1),
    'constant': lambda x: torch.full_like(x, 1e4),
    'large': lambda x: 1e4 * x,
    'tiny': lambda x: 1e-30 * x,
}
MODES = {
    'eval': lambda model: model.eval(),
    'train': lambda model: model.train(),
    'fused': lambda model: fuse_for_inference(model.eval()),
}


@pytest.mark.parametrize('half', [False, True], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('mode', MODES)
def test_extreme_images_give_finite_streams(mode, half):
    for name, make_extreme in EXTREMES.items():
        model = MODES[mode](make_backbone())
        with torch.set_grad_enabled(mode == 'train'), torch.autocast('cpu', enabled=half):
            outs = model(make_extreme(make_images()))
        assert all(out.isfinite().all() for out in outs), name
        if mode == 'train':
            sum(out.float().square().mean() for out in outs).backward()
            assert all(p.grad.isfinite().all() for p in model.parameters()), name


@pytest.mark.parametrize('half', [False, True], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('mode', MODES)
def test_nan_in_a_pixel_shows_in_every_stream(mode, half):
    """And only in its own image, unless the batch is normalized together."""
    model, x = MODES[mode](make_backbone()), make_images()
    x[0, 1, 30, 30] = float('nan')
    with torch.no_grad(), torch.autocast('cpu', enabled=half):
        outs = model(x)
    for out in outs:
        assert out[0].isnan().any()
        assert out[1].isnan().any() == (mode == 'train')


@needs('mmseg')
def test_nan_in_a_pixel_shows_in_the_loss():
    model, x = Segmentor(), make_images()
    x[0, 1, 30, 30] = float('nan')
    assert model(x, torch.randint(5, (2, 64, 64))).isnan()


@pytest.mark.parametrize('kind', [WeightedCrossEntropyLoss, OHEMCrossEntropyLoss])
def test_nan_in_one_logit_shows_in_the_loss(kind):
    logits, label = torch.randn(1, 3, 4, 4), torch.randint(3, (1, 4, 4))
    logits[0, 0, 2, 2] = float('nan')
    assert kind()(logits, label).isnan()
