"""Training with the backbone in CUDA graphs is training without them."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from smooth import smooth
from torch import Tensor, nn

from mmhrformer import HRFormer, graph_backbone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
]

# Relative errors of weights' changes and losses over five steps. The same kernels run; casts of
# weights and sums by atomic additions, as of bilinear upsampling, differ.
LIMITS = {None: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
every_dtype = pytest.mark.parametrize('dtype', LIMITS, ids=str)


class Squares(BaseModel):
    """A backbone whose outputs shall be small."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        arch = dict(channels=(18, 36, 72, 144), num_heads=(1, 2, 4, 8), num_modules=(1, 1, 1))
        self.backbone = HRFormer(**{'arch': arch, **options})

    def forward(self, inputs: Tensor | list[Tensor], mode: str = 'loss') -> dict[str, Tensor]:
        inputs = torch.stack(inputs) if isinstance(inputs, list) else inputs
        return dict(loss=sum(x.float().square().mean() for x in self.backbone(inputs)))


def images(seed: int = 0, size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 3, 96, 80, generator=generator).cuda()


def autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    return torch.autocast('cuda', dtype, enabled=dtype is not None)


def train(
    model: nn.Module, dtype: torch.dtype | None, accumulate: int = 1, sizes: tuple = (4,) * 5
) -> Tensor:
    """Losses of steps of SGD with batches of some sizes; Adam would magnify what is near zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scaler = torch.cuda.amp.GradScaler(init_scale=1024.0, enabled=dtype == torch.float16)
    losses = []
    for step, size in enumerate(s for s in sizes for _ in range(accumulate)):
        with autocast(dtype):
            loss = model(images(step, size))['loss']
        scaler.scale(loss).backward()
        losses.append(loss.detach())
        if step % accumulate == accumulate - 1:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return torch.stack(losses)


def nearly(model: nn.Module) -> nn.Module:
    """A copy whose weights differ in their last bits."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-7 * torch.randn_like(p))
    return model


def distance(ours: nn.Module, plain: nn.Module, start: nn.Module) -> float:
    """Distance between weights, relative to their distance from the start."""

    def norm(a: nn.Module, b: nn.Module) -> Tensor:
        pairs = zip(a.parameters(), b.parameters())
        return sum((x - y).double().square().sum() for x, y in pairs).sqrt()

    return (norm(ours, plain) / norm(plain, start)).item()


@every_dtype
@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_five_steps_are_those_without_graphs(dtype, accumulate, layout):
    start = smooth(Squares()).cuda().train().to(memory_format=layout)
    plain, model = copy.deepcopy(start), copy.deepcopy(start)
    graph_backbone(model, images(9), dtype)
    for (name, ours), theirs in zip(model.state_dict().items(), start.state_dict().values()):
        assert torch.equal(ours, theirs), name  # the warm-up has left no trace
    losses = [train(m, dtype, accumulate, sizes=(4, 4, 4, 4, 3)) for m in (model, plain)]
    assert model.backbone.forward.replays == 4 * accumulate
    torch.testing.assert_close(*losses, rtol=LIMITS[dtype], atol=0)
    # The gradient of squares of normalized maps is what little does not cancel, so that in bfloat16
    # the last bits of the weights matter: on a CPU, without graphs, they move them by 0.2 to 0.3.
    twin = nearly(start)
    train(twin, dtype, accumulate, sizes=(4, 4, 4, 4, 3))
    apart, noise = distance(model, plain, start), distance(twin, plain, start)
    print(f'distance {apart:.1e}, of nearly equal weights {noise:.1e}')  # shown by pytest -rP
    limit = LIMITS[dtype]
    assert apart < (max(limit, noise) if dtype == torch.bfloat16 else limit)
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=LIMITS[dtype], atol=1e-3, msg=name)


@every_dtype
def test_dropped_paths_differ_from_step_to_step(dtype):
    """Losses equal those without graphs, since both draw equally many random numbers."""
    start = Squares(drop_path_rate=0.5).cuda().train()
    plain, model = copy.deepcopy(start), copy.deepcopy(start)
    losses = []
    for m in (model, plain):
        torch.manual_seed(5)
        if m is model:
            graph_backbone(m, images(0), dtype)
        with autocast(dtype):
            losses.append([m(images(0))['loss'].item() for _ in range(5)])
    assert model.backbone.forward.replays == 5
    assert len(set(losses[0])) == 5
    assert losses[0] == pytest.approx(losses[1], rel=LIMITS[dtype])
    assert train(model, dtype).isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_outlive_the_next_pass():
    model = graph_backbone(Squares().cuda().train(), images())
    model(images())['loss'].backward()
    grads = [p.grad for p in model.parameters()]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1  # none was cloned
    before = [grad.clone() for grad in grads]
    features = [x.detach() for x in model.backbone(images(1))]
    kept = [x.clone() for x in features]
    torch.autograd.grad(model(images(2))['loss'], list(model.parameters()))
    for now, then in zip(grads + features, before + kept):
        assert torch.equal(now, then)
    assert model.backbone.forward.replays == 3


def test_two_forward_passes_before_a_backward_pass():
    plain = Squares().cuda().train()
    model = graph_backbone(copy.deepcopy(plain), images(9))
    for m in (model, plain):
        (m(images(0))['loss'] * m(images(1))['loss']).backward()
    assert model.backbone.forward.replays == 1
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-3, msg=name)


def run(work, graphs: bool, dtype: str | None) -> dict:
    """Two epochs of two batches and a smaller one; the last checkpoint."""
    amp = dict(type='AmpOptimWrapper', dtype=dtype, loss_scale=1024.0)
    optimizer = dict(optimizer=dict(type='SGD', lr=1e-3, momentum=0.9), accumulative_counts=2)
    runner = Runner(
        model=Squares(),
        work_dir=str(work),
        train_dataloader=dict(
            batch_size=4,
            num_workers=1,
            pin_memory=True,  # its thread calls CUDA during the capture
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=[dict(inputs=images(i)[0].cpu()) for i in range(10)],
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper={**(amp if dtype else {}), **optimizer},
        custom_hooks=[
            dict(type='EMAHook', momentum=0.1),
            *([dict(type='mmhrformer.CUDAGraphHook')] if graphs else []),
        ],
        randomness=dict(seed=0),
        experiment_name=work.name,
    )
    runner.train()
    (log,) = work.glob('*/*.log')
    assert ('CUDA graphs: 4 of 6 training passes' in log.read_text()) == graphs
    return torch.load(work / 'epoch_2.pth', map_location='cpu', weights_only=False)


@pytest.mark.parametrize('dtype', [None, 'bfloat16', 'float16'])
def test_hook_with_averaged_weights_and_small_last_batches(dtype, tmp_path):
    ours, plain = (run(tmp_path / str(graphs), graphs, dtype) for graphs in (True, False))
    for part in ('state_dict', 'ema_state_dict'):
        assert ours[part].keys() == plain[part].keys()
        for name, value in ours[part].items():
            torch.testing.assert_close(value, plain[part][name], rtol=1e-2, atol=1e-3, msg=name)
