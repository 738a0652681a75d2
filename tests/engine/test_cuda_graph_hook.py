"""CUDA graphs in training, with a stand-in for the capture that a CPU can run."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmhrformer import HOOKS, HRFormer, graph_backbone
from mmhrformer.engine import cuda_graph_hook
from mmhrformer.models import checks

pytestmark = pytest.mark.once
ARCH = dict(channels=(4, 8, 8, 16), num_heads=(1, 2, 2, 2), num_modules=(1, 1, 1), num_blocks=1)


class StandIn:
    """Replays by calling the function again, into the memory of the first time, as a graph does."""

    def __init__(self, device: torch.device) -> None:
        self.warm_up = contextlib.nullcontext

    def capture(self, function: Callable) -> tuple[Callable, list[Tensor]]:
        static = [tensor.detach().clone() for tensor in function()]

        def replay() -> None:
            for old, new in zip(static, function()):
                old.copy_(new)

        return replay, static


@pytest.fixture
def _on_cpu(monkeypatch):
    monkeypatch.setattr(cuda_graph_hook, 'GraphCapture', StandIn)
    monkeypatch.setattr(cuda_graph_hook, 'WARM_UP', 1)


class Squares(BaseModel):
    """A backbone whose outputs shall be small."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = HRFormer(**{'arch': ARCH, 'window_size': 3, **options})

    def forward(self, inputs: Tensor | list[Tensor], mode: str = 'loss') -> dict[str, Tensor]:
        inputs = torch.stack(inputs) if isinstance(inputs, list) else inputs
        return dict(loss=sum(x.float().square().mean() for x in self.backbone(inputs)))


def images(seed: int = 0, size: int = 2) -> Tensor:
    return torch.rand(size, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def pair(**options) -> tuple[Squares, Squares, cuda_graph_hook.GraphedForward]:
    """The same model plain and captured."""
    plain = Squares(**options).train()
    model = graph_backbone(copy.deepcopy(plain), images(9))
    return plain, model, model.backbone.forward


def train(model: nn.Module, steps: int = 5, accumulate: int = 1, size: int = 2) -> list[Tensor]:
    """Losses of some steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps * accumulate):
        loss = model(images(step, size))['loss']
        loss.backward()
        losses.append(loss.detach())
        if step % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def assert_same(ours: nn.Module, plain: nn.Module) -> None:
    """Weights, statistics, counts and gradients, to the bit."""
    theirs = plain.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


@pytest.mark.usefixtures('_on_cpu')
@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('options', [{}, dict(frozen_stages=1), dict(norm_eval=True)], ids=str)
def test_training_is_the_same_to_the_bit(accumulate, options):
    plain, model, graph = pair(**options)
    assert_same(model, plain)  # the warm-up has left no trace
    assert train(model, accumulate=accumulate) == train(plain, accumulate=accumulate)
    assert graph.replays == 5 * accumulate
    assert_same(model, plain)


@pytest.mark.usefixtures('_on_cpu')
def test_gradients_are_one_copy_in_the_layout_of_the_weights():
    plain = Squares().train().to(memory_format=torch.channels_last)
    model = copy.deepcopy(plain)
    batch = images().to(memory_format=torch.channels_last)
    graph_backbone(model, batch)
    for copied in (plain, model):
        copied(batch)['loss'].backward()
    assert_same(model, plain)
    grads = [p.grad for p in model.parameters()]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1  # none was cloned
    before = [grad.clone() for grad in grads]
    torch.autograd.grad(model(batch + 1)['loss'], list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, before))
    assert model.backbone.forward.replays == 2


class Odd(nn.Module):
    """A weight that lies in columns, whose gradient is an expanded row, and one that is idle."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 4, generator=torch.manual_seed(0)).t())
        self.idle = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.mean() * self.weight.sum(0) * torch.tensor([1.0, 2.0, 3.0]),)


@pytest.mark.usefixtures('_on_cpu')
def test_odd_layouts_and_idle_weights():
    plain = Odd().train()
    model = graph_backbone(copy.deepcopy(plain), images())
    for m in (model, plain):
        m(images(1))[0].square().sum().backward()
    assert model.forward.replays == 1
    assert model.idle.grad is None
    assert model.weight.grad.stride() == model.weight.stride()
    assert_same(model, plain)


@pytest.mark.usefixtures('_on_cpu')
def test_weights_of_two_data_types(monkeypatch):
    plain = Squares().train()
    plain.backbone.conv1.double()
    for module in (plain.backbone.conv1, plain.backbone.bn1):
        module.register_forward_hook(lambda m, args, out: out.float())
    plain.backbone.conv1.register_forward_pre_hook(lambda m, args: args[0].double())
    monkeypatch.setattr(checks, 'check_images', lambda *_: None)
    model = graph_backbone(copy.deepcopy(plain), images())
    assert train(model, 2) == train(plain, 2)
    assert model.backbone.forward.replays == 2
    assert_same(model, plain)


def cases() -> dict[str, Callable]:
    """Calls that must not be replayed."""
    return {
        'one image, which would broadcast': lambda m: m(images(size=1)),
        'a larger batch': lambda m: m(images(size=3)),
        'another memory format': lambda m: m(images().to(memory_format=torch.channels_last)),
        'evaluation': lambda m: m.eval()(images()),
        'a part in evaluation': lambda m: (m.backbone.bn1.eval(), m(images()))[1],
        'no gradients': lambda m: torch.no_grad()(m)(images()),
        'gradients of images': lambda m: m(images().requires_grad_()),
        'autocast': lambda m: torch.autocast('cpu', torch.bfloat16)(m.forward)(images()),
        'frozen later': lambda m: (m.backbone.conv1.requires_grad_(False), m(images()))[1],
        'moved weights': lambda m: (move(m.backbone.conv1), m(images()))[1],
    }


def move(module: nn.Module) -> None:
    module.weight.data = module.weight.data + 1


@pytest.mark.usefixtures('_on_cpu')
@pytest.mark.parametrize('case', cases())
def test_all_else_goes_the_ordinary_way(case):
    plain, model, graph = pair()
    ours, theirs = (cases()[case](m)['loss'] for m in (model, plain))
    assert graph.replays == 0
    assert torch.equal(ours, theirs)
    if theirs.requires_grad:
        ours.backward(), theirs.backward()
    assert_same(model, plain)


@pytest.mark.usefixtures('_on_cpu')
def test_autocast_of_the_capture():
    plain, model = Squares().train(), Squares().train()
    graph_backbone(model, images(9), torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        losses = [m(images())['loss'] for m in (model, plain)]
    assert model.backbone.forward.replays == 1
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert_same(model, plain)


class Tied(nn.Module):
    """Layers that share a weight, and one that nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.last(self.second(self.first(x.mean((2, 3)).repeat(1, 2)[:, :4]))),)


@pytest.mark.usefixtures('_on_cpu')
def test_weights_are_converted_all_at_once_but_for_shared_ones():
    torch.manual_seed(0)
    plain = Tied()
    model = graph_backbone(copy.deepcopy(plain), images(9), torch.bfloat16)
    halved, layers = model.forward.halved, (model.first, model.second, model.last)
    expected = [layers[0].bias, layers[1].bias, layers[2].weight, layers[2].bias]
    assert [id(p) for p in halved] == [id(p) for p in expected]
    for copied in (model, plain):
        with torch.autocast('cpu', torch.bfloat16):
            copied(images())[0].float().square().sum().backward()
    assert model.forward.replays == 1
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        assert p.grad.dtype == torch.float32
        if name == 'first.weight':  # of which autocast's cache makes one sum in bfloat16
            torch.testing.assert_close(p.grad, q.grad, atol=1e-2, rtol=1e-2)
        else:
            assert torch.equal(p.grad, q.grad), name


@pytest.mark.usefixtures('_on_cpu')
def test_random_numbers_go_on_as_if_nothing_had_been_captured():
    plain, model = (Squares(drop_path_rate=0.5).train() for _ in range(2))
    losses = []
    for m in (model, plain):
        torch.manual_seed(5)
        if m is model:
            graph_backbone(m, images(9))
        losses.append(train(m))
    assert losses[0] == losses[1]
    assert model.backbone.forward.replays == 5


@pytest.mark.usefixtures('_on_cpu')
def test_two_forward_passes_before_a_backward_pass():
    """The second one goes the ordinary way while the first one is alive."""
    plain, model, graph = pair()
    for m in (model, plain):
        (m(images(0))['loss'] * m(images(1))['loss']).backward()
    assert graph.replays == 1
    assert_same(model, plain)
    model(images(2))  # its result is thrown away
    model(images(3))['loss'].backward()
    assert graph.replays == 3


@pytest.mark.usefixtures('_on_cpu')
def test_outputs_outlive_the_next_pass():
    plain, model, graph = pair()
    first = [x.detach() for x in model.backbone(images(0))]
    model.backbone(images(1))
    assert graph.replays == 2
    assert all(torch.equal(a, b) for a, b in zip(first, plain.backbone(images(0))))


@pytest.mark.usefixtures('_on_cpu')
def test_wrong_gradients_are_refused():
    _, model, _ = pair()
    loss = model(images())['loss']
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='second backward pass'):
        loss.backward()
    with pytest.raises(RuntimeError, match=r'does not depend on outputs \[1, 2, 3\]'):
        model.backbone(images())[0].mean().backward()
    loss = model(images())['loss']
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


@pytest.mark.usefixtures('_on_cpu')
def test_second_derivatives_are_refused():
    _, model, _ = pair()
    loss = model(images())['loss']
    with pytest.raises(RuntimeError, match=r'second derivatives.* do not use CUDAGraphHook'):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@pytest.mark.usefixtures('_on_cpu')
def test_buffers_that_are_assigned_are_kept_up_to_date():
    """As PreciseBNHook assigns running statistics, whose old memory graphs would still write."""
    plain, model, graph = pair()
    for m in (plain, model):
        m.backbone.bn1.running_mean = torch.full_like(m.backbone.bn1.running_mean, 3.0)
    assert train(model, 2) == train(plain, 2)
    assert graph.replays == 2
    assert_same(model, plain)
    for m in (plain, model):
        m.backbone.bn1.num_batches_tracked = m.backbone.bn1.num_batches_tracked.int()
    assert torch.equal(*(m(images())['loss'] for m in (model, plain)))
    assert graph.replays == 2
    assert_same(model, plain)


@pytest.mark.usefixtures('_on_cpu')
def test_copies_and_pickles_are_ordinary_models():
    plain, model, graph = pair()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.backbone.forward == HRFormer.forward.__get__(other.backbone)
        assert_same(other, plain)
        assert torch.equal(other(images())['loss'], Squares().train()(images())['loss'])
        other.load_state_dict(model.state_dict())
    assert graph.replays == 0
    assert copy.copy(model)(images())['loss'].requires_grad
    assert graph.replays == 1  # it has the weights of the model


@pytest.mark.usefixtures('_on_cpu')
def test_captured_again_for_other_images():
    _, model, graph = pair()
    graph_backbone(model, images(size=3))
    assert model.backbone.forward is not graph
    assert model.backbone.forward.ordinary == HRFormer.forward.__get__(model.backbone)
    train(model, size=3)
    assert model.backbone.forward.replays == 5


@pytest.mark.usefixtures('_on_cpu')
def test_inside_distributed_data_parallel(tmp_path):
    """DDP's hooks on the parameters see all gradients, and no other autograd node is used."""
    options = dict(rank=0, world_size=1, init_method=f'file://{tmp_path}/store')
    torch.distributed.init_process_group('gloo', **options)
    try:
        plain = Squares().train()
        model = DistributedDataParallel(copy.deepcopy(plain))
        seen = []

        def double(state, bucket):
            future = torch.futures.Future()
            seen.append(bucket.buffer().numel())
            future.set_result(bucket.buffer() * 2)
            return future

        model.register_comm_hook(None, double)
        graph_backbone(model, images(9))
        (2 * plain(images())['loss']).backward()
        for _ in range(2):  # the buckets are rebuilt after the first time
            model.zero_grad()
            model(images())['loss'].backward()
        assert model.module.backbone.forward.replays == 2
        assert sum(seen) == 2 * sum(p.numel() for p in plain.parameters())
        for ours, theirs in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad)
    finally:
        torch.distributed.destroy_process_group()


class FSDPModule(nn.Module):
    """Modules wrapped by FSDP have a base class of this name."""


@pytest.mark.usefixtures('_on_cpu')
def test_what_cannot_be_captured_is_refused():
    with pytest.raises(ValueError, match='with_cp=False'):
        graph_backbone(Squares(with_cp=True).train(), images())
    with pytest.raises(ValueError, match='as FSDP and DeepSpeed'):
        graph_backbone(FSDPModule().train(), images())
    with pytest.raises(ValueError, match='as FSDP and DeepSpeed'):
        graph_backbone(nn.DataParallel(Squares()), images())
    with pytest.raises(ValueError, match=r'model\.train\(\)'):
        graph_backbone(Squares().eval(), images())
    model = Squares(frozen_stages=4).train()
    with pytest.raises(
        RuntimeError, match=r'HRFormer, cannot be captured .* that require gradients'
    ):
        graph_backbone(model, images())
    assert 'forward' not in vars(model.backbone)


def test_there_has_to_be_a_gpu():
    with pytest.raises(RuntimeError, match=r"device='cpu'.*do not use CUDAGraphHook"):
        graph_backbone(Squares().train(), images())


class Checks(Hook):
    """Tells whether the graphs are there."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.was_graphed = 'forward' in vars(runner.model.backbone)


def run(work, *hooks: dict | Hook, **options) -> tuple[Runner, dict]:
    """Two epochs of two batches and a smaller one; the last checkpoint."""
    torch.manual_seed(7)
    runner = Runner(
        model=Squares(),
        work_dir=str(work),
        train_dataloader=dict(
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=[dict(inputs=images(i)[0]) for i in range(5)],
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-2, momentum=0.9), **options),
        custom_hooks=[dict(type='EMAHook', momentum=0.1), *hooks],
        randomness=dict(seed=0),
        experiment_name=f'{work.name}{len(hooks)}',
    )
    runner.train()
    return runner, torch.load(work / 'epoch_2.pth', map_location='cpu', weights_only=False)


@pytest.mark.usefixtures('_on_cpu')
@pytest.mark.parametrize('options', [{}, dict(accumulative_counts=2)], ids=str)
def test_hook_in_a_config(tmp_path, options):
    _, plain = run(tmp_path / 'plain', **options)
    checks = Checks()
    graphs = dict(type='mmhrformer.CUDAGraphHook')
    runner, ours = run(tmp_path / 'graphs', graphs, checks, **options)
    assert checks.was_graphed
    assert 'forward' not in vars(runner.model.backbone)
    (log,) = (tmp_path / 'graphs').glob('*/*.log')
    assert 'CUDA graphs: 4 of 6 training passes' in log.read_text()
    for part in ('state_dict', 'ema_state_dict'):
        assert ours[part].keys() == plain[part].keys()
        assert all(torch.equal(value, plain[part][name]) for name, value in ours[part].items())


def test_hook_refuses_before_training(tmp_path):
    assert isinstance(HOOKS.build(dict(type='CUDAGraphHook')), cuda_graph_hook.CUDAGraphHook)
    with pytest.raises(RuntimeError, match="device='cpu'"):
        run(tmp_path, dict(type='mmhrformer.CUDAGraphHook'))
