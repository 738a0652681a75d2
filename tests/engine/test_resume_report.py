"""Options that `--resume` keeps although the config differs are reported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_runs import log, make_runner, train

RUN = dict(type='SGD', lr=1e-3, momentum=0.9, weight_decay=0.1)
STEPS = dict(type='MultiStepLR', milestones=[2, 3], gamma=0.1)
ADAMW = dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999))
COSINE = dict(
    type='mmhrformer.WarmupCosineLR', warmup=1, start_factor=0.1, convert_to_iter_based=True
)


def optimizer(**options) -> dict:
    return dict(optim_wrapper=dict(optimizer=dict(options)))


def told(work: Path) -> list[str]:
    """The lines of the warning."""
    found = re.search(r'which override the config:\n((?:  .*\n)*)', log(work))
    return [line.strip() for line in found[1].splitlines()] if found else []


@pytest.mark.parametrize(
    ('before', 'after', 'lines'),
    [
        (
            dict(param_scheduler=STEPS, **optimizer(**RUN)),
            dict(param_scheduler=STEPS, **optimizer(**{**RUN, 'lr': 1e-2, 'weight_decay': 0.2})),
            [
                'optim_wrapper.optimizer.lr: 0.01 in the config, 0.001 in the checkpoint',
                'optim_wrapper.optimizer.weight_decay: 0.2 in the config, 0.1 in the checkpoint',
            ],
        ),
        (
            dict(optimizer(**RUN)),  # no schedule
            dict(optimizer(**{**RUN, 'lr': 1e-2, 'momentum': 0.5})),
            [
                'optim_wrapper.optimizer.lr: 0.01 in the config, 0.001 in the checkpoint',
                'optim_wrapper.optimizer.momentum: 0.5 in the config, 0.9 in the checkpoint',
            ],
        ),
        (
            dict(param_scheduler=STEPS, **optimizer(**ADAMW)),
            dict(
                param_scheduler=[dict(STEPS, milestones=[3], gamma=0.5)],
                length=dict(max_epochs=6),
                **optimizer(**{**ADAMW, 'betas': (0.9, 0.95)}),
            ),
            [
                'optim_wrapper.optimizer.betas: (0.9, 0.95) in the config, '
                '(0.9, 0.999) in the checkpoint',
                'param_scheduler[0].end: 6 in the config, 4 in the checkpoint',
                'param_scheduler[0].gamma: 0.5 in the config, 0.1 in the checkpoint',
                'param_scheduler[0].milestones: [3] in the config, [2, 3] in the checkpoint',
                'train_cfg.max_epochs: 6, was 4; but the schedule ends at 4, and the rate '
                'stays constant from there',
            ],
        ),
        (
            dict(param_scheduler=dict(COSINE)),
            dict(param_scheduler=[dict(COSINE, end_factor=0.5), STEPS]),
            [
                'param_scheduler: 2 schedules in the config, 1 in the checkpoint',
                'param_scheduler[0].end_factor: 0.5 in the config, 0.0 in the checkpoint',
            ],
        ),
        (
            dict(param_scheduler=STEPS),
            dict(param_scheduler=dict(type='CosineAnnealingLR', T_max=4)),
            [
                'param_scheduler[0].type: a CosineAnnealingLR in the config, a schedule of another '
                'kind in the checkpoint'
            ],
        ),
        (
            dict(param_scheduler=dict(STEPS, end=4)),
            dict(param_scheduler=dict(STEPS, end=4), length=dict(max_epochs=5)),
            [
                'train_cfg.max_epochs: 5, was 4; but the schedule ends at 4, and the rate '
                'stays constant from there'
            ],
        ),
        (
            dict(hook=dict(save_optimizer=False, save_param_scheduler=False)),
            dict(param_scheduler=STEPS),
            [
                'optimizer: not in the checkpoint, starts from scratch',
                'param_schedulers: not in the checkpoint, starts from scratch',
            ],
        ),
        (dict(param_scheduler=STEPS, **optimizer(**ADAMW)),) * 2 + ([],),
        (optimizer(**ADAMW), optimizer(**ADAMW, foreach=True), []),  # the results are the same
        (dict(param_scheduler=dict(COSINE)),) * 2 + ([],),
    ],
)
def test_what_resuming_keeps_is_told(tmp_path, before, after, lines):
    train(tmp_path, 9, **before)
    assert told(tmp_path) == []
    train(tmp_path, 9, resume=True, **after)
    assert told(tmp_path) == lines


def test_by_iterations(tmp_path):
    poly = dict(type='PolyLR', power=0.9, by_epoch=False)
    train(tmp_path, 9, by_epoch=False, workers=1, param_scheduler=poly)
    changed = dict(param_scheduler=dict(poly, power=1.0), length=dict(max_iters=20))
    train(tmp_path, 9, by_epoch=False, workers=1, resume=True, **changed)
    assert [line.split(':')[0] for line in told(tmp_path)] == [
        'param_scheduler[0].end',
        'param_scheduler[0].power',
        'train_cfg.max_iters',
    ]


def test_weights_alone_are_no_resuming(tmp_path):
    train(tmp_path / 'one', 9, **optimizer(**RUN))
    checkpoint = str(tmp_path / 'one/epoch_2.pth')
    runner = make_runner(tmp_path / 'two', load_from=checkpoint, **optimizer(**{**RUN, 'lr': 1}))
    runner.train()
    assert told(tmp_path / 'two') == []
