"""The hook compiles the blocks under mmengine's runner, before the first iteration."""

from __future__ import annotations

import torch
from graphs import Graphs, can_compile_blocks
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor

from mmhrformer import HOOKS, HRFormer

ARCH = dict(channels=(4, 8, 8, 16), num_heads=(1, 2, 2, 2), num_modules=(1, 1, 1), num_blocks=1)


class Squares(BaseModel):
    """A backbone whose outputs shall be small."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = HRFormer(ARCH, window_size=3, out_indices=(0,))

    def forward(self, inputs: list[Tensor], mode: str) -> dict[str, Tensor]:
        return dict(loss=self.backbone(torch.stack(inputs))[0].square().mean())


@can_compile_blocks
def test_blocks_are_compiled_in_training(tmp_path):
    graphs = Graphs()
    Runner(
        model=Squares(),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=[dict(inputs=torch.rand(3, 64, 64)) for _ in range(4)],
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)),
        custom_hooks=[dict(type='mmhrformer.CompileBlocksHook', backend=graphs)],
        experiment_name=tmp_path.name,
    ).train()
    assert len(graphs) == 8  # attention and FFN of four streams
    assert (tmp_path / 'epoch_2.pth').is_file()


def test_options_are_torch_compiles():
    hook = HOOKS.build(dict(type='CompileBlocksHook', mode='reduce-overhead', dynamic=True))
    assert hook.options == dict(mode='reduce-overhead', dynamic=True)
