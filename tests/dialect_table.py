"""Conversion of a checkpoint of each dialect, and differences from the golden outputs.

python tests/dialect_table.py
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import golden
import torch
from mmengine.logging import MMLogger

from mmhrformer import load_checkpoint
from mmhrformer.checkpoints import convert, unwrap
from mmhrformer.checkpoints.writing import to_dialect, wrap

SEG_KEYS = {'small': 'seg_small_w7', 'base': 'seg_base_w7', 'base-w15': 'seg_base_w15'}
# Image, and the golden output that a whole model gives for it.
OUTPUTS = {
    'cls': ((2, 3, 224, 224), 'logits'),
    'pose': ((1, 3, 256, 192), 'rpe.256x192.heatmap'),
    'seg': ((1, 3, 128, 160), '128x160.logits'),
}


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Task, architecture, config and name of the golden files."""
    for arch, config in golden.CLS_CONFIGS.items():
        yield 'cls', arch, config, f'cls_{arch}'
    for arch, config in golden.POSE_CONFIGS.items():
        yield 'pose', arch, config, f'pose_{arch}'
    for arch, config in golden.SEG_CONFIGS.items():
        yield 'seg', arch, config, SEG_KEYS[arch]


def checkpoints(task: str, name: str) -> Iterator[tuple[str, dict]]:
    """The same weights in each dialect, through a file as it would be on a disk."""
    official = golden.official_checkpoint(task, f'keys_{name}.json')
    yield f'official {task}', official
    ours, _ = convert(unwrap(official))
    yield 'ours', wrap(ours)
    if task == 'pose':
        yield 'mmpose', wrap(to_dialect(ours, 'mmpose'))


def through_a_file(content: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def main() -> None:
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    print('| dialect | task | arch | tensors used / in the model | renamed | joined | dropped '
          '| missing, unused | max abs difference |\n|' + ' :-- |' * 3 + ' --: |' * 6)  # fmt: skip
    for task, arch, config, name in rows():
        shape, output = OUTPUTS[task]
        goldens = golden.load(f'{name}.npz')
        for dialect, checkpoint in checkpoints(task, name):
            model = golden.build(config)
            model.train(False)
            report = load_checkpoint(model, through_a_file(checkpoint), strict=True)
            with torch.no_grad():
                out = model(golden.image(shape), None, mode='tensor')
            worst = golden.difference(goldens, output, out)
            print(
                f'| {dialect} | {task} | {arch} | {report.used} / {len(model.state_dict())} '
                f'| {len(report.renamed)} | {len(report.joined)} | {len(report.dropped)} '
                f'| {len(report.missing)}, {len(report.unused)} | {worst:.1e} |',
                flush=True,
            )
            assert worst < 1e-4


if __name__ == '__main__':
    main()
