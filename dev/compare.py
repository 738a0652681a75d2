"""Train several configs at the size of the demo, and compare their metrics.

    python dev/compare.py hrformer-tiny_8xb128_in1k hrformer-tiny-no-dwconv_8xb128_in1k

The distinctive options of a config (attention, FFN, another backbone, another head) are transferred
to the demo config of its task, which is small enough to train on a CPU within minutes:
architecture, data and schedule are the demo's. It is trained by the stock train.py.
OUT/results.json contains the metrics, OUT/CONFIG-SEED the logs for tools/analyze_logs.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / 'demo'))

import demo_data
from mmengine.config import Config
from run_demo import DATA, TASKS, DemoError, run_tool

from mmhrformer.configs import find_config, read_config

TASK_OF_SCOPE = {'mmpretrain': 'cls', 'mmpose': 'pose', 'mmseg': 'seg'}

# Options of a backbone that depend on its size, its data or its task, and are not compared.
OF_THE_DEMO = {
    'arch',
    'drop_path_rate',
    'extra',
    'in_channels',
    'init_cfg',
    'norm_cfg',
    'out_indices',
    'type',
    'upsample',
}
# Backbones with a single map, at 1/16 of the image, of about the demo's number of parameters.
SINGLE_MAP_CHANNELS = 96
SMALL_SWIN = dict(
    arch=dict(embed_dims=24, depths=(2, 2, 2), num_heads=(1, 2, 4)),
    window_size=4,
    pad_small_map=True,
    out_indices=(2,),
)
SMALL_VIT = dict(
    arch=dict(embed_dims=SINGLE_MAP_CHANNELS, num_layers=5, num_heads=3, feedforward_channels=384),
    out_type='featmap',
)


def hrnet_extra(arch: Mapping) -> dict:
    """The layout of an HRFormer, as the option ``extra`` of the frameworks' HRNet."""
    stages = dict(
        stage1=dict(
            num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(2,), num_channels=(64,)
        )
    )
    for streams, modules in enumerate(arch['num_modules'], start=2):
        stages[f'stage{streams}'] = dict(
            num_modules=modules,
            num_branches=streams,
            block='BASIC',
            num_blocks=(arch['num_blocks'],) * streams,
            num_channels=tuple(arch['channels'][:streams]),
        )
    return stages


def small_backbone(backbone: Mapping, demo: Config) -> dict:
    """Reduce a backbone to the size of the demo's.

    Args:
        backbone (Mapping): The backbone of the config to compare.
        demo (Config): The demo config of its task.

    Returns:
        dict: The small backbone.

    Raises:
        ValueError: If its type is not supported.
    """
    kind = backbone['type'].split('.')[-1]
    own = {key: value for key, value in backbone.items() if key not in OF_THE_DEMO}
    if kind == 'HRFormer':
        return {**demo.model.backbone, **own}
    if kind == 'HRNet':
        return dict(type='HRNet', extra=hrnet_extra(demo.arch), norm_cfg=dict(type='BN'))
    if kind == 'SwinTransformer':
        return {**own, 'type': backbone['type'], **SMALL_SWIN}
    if kind.endswith('VisionTransformer'):
        size = demo.codec.input_size[::-1] if 'codec' in demo else 32
        return {**own, 'type': backbone['type'], **SMALL_VIT, 'img_size': size}
    raise ValueError(f'backbone.type={backbone["type"]!r}: expected HRFormer, HRNet, Swin or ViT')


def demo_config(name: str) -> tuple[str, Config]:
    """Transfer the distinctive options of a config to the demo config of its task.

    Args:
        name (str): Path of the config, or name of a shipped one.

    Returns:
        tuple[str, Config]: The task, and the config to train.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If it is for another task, or has an unsupported backbone.
    """
    cfg = read_config(find_config(name))
    scope = cfg.get('default_scope')
    if scope not in TASK_OF_SCOPE:
        raise ValueError(f'{name}: default_scope={scope!r}: choose one of {list(TASK_OF_SCOPE)}')
    task = TASK_OF_SCOPE[scope]
    demo = read_config(find_config(TASKS[task].config))
    demo.custom_imports.imports = cfg.custom_imports.imports
    demo.model.backbone = backbone = small_backbone(cfg.model.backbone, demo)
    if task == 'seg':
        for small, head in zip(demo.model.decode_head, cfg.model.decode_head):
            if 'groups' in head:
                groups = math.gcd(sum(small.in_channels), small.channels)
                small.update(kernel_size=head.kernel_size, groups=groups)
    elif 'Transformer' in backbone['type']:
        demo.model.head.in_channels = SINGLE_MAP_CHANNELS
        if task == 'cls':
            demo.model.neck = dict(type='GlobalAveragePooling')
        else:
            demo.model.head.update(deconv_out_channels=(64, 64), deconv_kernel_sizes=(4, 4))
    demo.pop('arch')  # now in the backbone
    return task, demo


def set_length(cfg: Config, length: int) -> None:
    """Change the length of a demo training, including its schedules.

    Args:
        cfg (Config): The config; changed in place.
        length (int): Epochs, or iterations if the config uses these.
    """
    unit = 'max_iters' if 'max_iters' in cfg.train_cfg else 'max_epochs'
    before = cfg.train_cfg[unit]
    cfg.train_cfg[unit] = length
    options = cfg.param_scheduler
    for schedule in options if isinstance(options, list) else [options]:
        if schedule.end == before:
            schedule.end = length
    if unit == 'max_iters':
        cfg.train_cfg.val_interval = cfg.default_hooks.checkpoint.interval = length


def read_metric(task: str, work: Path) -> float:
    """Read the last metric in the log of a training, in percent.

    Args:
        task (str): A key of ``TASKS``.
        work (Path): Work folder of the training.

    Returns:
        float: The metric.

    Raises:
        DemoError: If the log has no validation.
    """
    log = max(work.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime)
    lines = map(json.loads, log.read_text().splitlines())
    metrics = [line[TASKS[task].metric] for line in lines if TASKS[task].metric in line]
    if not metrics:
        raise DemoError(f'{log} has no {TASKS[task].metric}: there was no validation')
    return metrics[-1] * TASKS[task].percent


def compare(names: Sequence[str], out: Path, lengths: Mapping, seeds: Sequence[int]) -> list[dict]:
    """Train configs and compare their metrics.

    Args:
        names (Sequence[str]): Paths of configs, or names of shipped ones.
        out (Path): Output folder.
        lengths (Mapping): Length of the training by task; by default as in the demo.
        seeds (Sequence[int]): Seeds to train each config with.

    Returns:
        list[dict]: ``config``, ``seed`` and ``metric`` in percent of each training.
    """
    configs = {Path(name).stem: demo_config(name) for name in names}
    threads = int(os.environ.get('OMP_NUM_THREADS', len(os.sched_getaffinity(0))))
    results = []
    for seed in seeds:
        for name, (task, cfg) in configs.items():
            cfg.randomness.seed = seed
            if lengths.get(task):
                set_length(cfg, lengths[task])
            folder = out / f'{name}-{seed}'
            folder.mkdir(parents=True, exist_ok=True)
            demo_data.TASKS[task](DATA)
            cfg.dump(folder / 'config.py')
            args = [str(folder / 'config.py'), '--work-dir', str(folder / 'work')]
            run_tool('train', args, folder / 'train.log', threads)
            metric = read_metric(task, folder / 'work')
            print(f'{name}, seed {seed}: {TASKS[task].metric_title} {metric:.1f} %', flush=True)
            results.append(dict(config=name, seed=seed, metric=metric))
            (out / 'results.json').write_text(json.dumps(results, indent=2))
    return results


def main() -> None:
    """Compare the configs named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', help='paths of configs, or names of shipped ones')
    parser.add_argument('--out', type=Path, default=Path('comparison'), help='output folder')
    parser.add_argument('--epochs', type=int, help="for classification and pose (demo's)")
    parser.add_argument('--iters', type=int, help="for segmentation (demo's)")
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='seeds for each config')
    args = parser.parse_args()
    lengths = dict(cls=args.epochs, pose=args.epochs, seg=args.iters)
    try:
        compare(args.configs, args.out.resolve(), lengths, args.seeds)
    except (DemoError, ImportError, OSError, ValueError) as err:
        sys.exit(f'compare.py: {err}')


if __name__ == '__main__':
    main()
