"""Train several configs at the size of the demo, and draw how they compare.

    python dev/compare.py hrformer-tiny_8xb128_in1k hrformer-tiny-no-dwconv_8xb128_in1k

What makes a config different (attention, FFN, another backbone, another head) is put into the demo
config of its task, which is small enough to learn on a CPU within minutes: the architecture, the
data and the schedule are the demo's. The stock train.py trains it. OUT/comparison.png has the curve
of the loss and the metric reached, OUT/results.json the numbers. A run that was finished before
with the same config is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / 'demo'))

import demo_data
import matplotlib
from mmengine.config import Config
from run_demo import DATA, TASKS, DemoError, run_tool

from mmhrformer.configs import find_config, read_config

matplotlib.use('Agg')
from matplotlib import pyplot as plt

TASK_OF_SCOPE = {'mmpretrain': 'cls', 'mmpose': 'pose', 'mmseg': 'seg'}

# Options of a backbone that belong to its size, its data or its task, not to what is compared.
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


@dataclass
class Run:
    """A config trained with a seed.

    Attributes:
        name (str): Name of the config.
        task (str): A key of ``run_demo.TASKS``.
        seed (int): Seed of the run.
        loss (list): Pairs of an iteration and the loss there.
        metric (float): The metric after the last epoch, in per cent.
        seconds (float): How long the training took.
    """

    name: str
    task: str
    seed: int
    loss: list = field(default_factory=list)
    metric: float = math.nan
    seconds: float = 0.0


def hrnet_extra(arch: Mapping) -> dict:
    """The layout of an HRFormer, as the option ``extra`` of the frameworks' HRNet.

    Args:
        arch (Mapping): ``channels``, ``num_modules`` and ``num_blocks`` of the HRFormer.

    Returns:
        dict: The option.
    """
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
    """Bring a backbone down to the size of the demo's.

    Args:
        backbone (Mapping): The backbone of the config to compare.
        demo (Config): The demo config of its task.

    Returns:
        dict: The small backbone.

    Raises:
        ValueError: If it is of a type that is not known here.
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
    raise ValueError(f'backbone.type={backbone["type"]!r}: give a config of HRFormer, HRNet or ViT')


def demo_config(name: str) -> tuple[str, Config]:
    """Put what makes a config different into the demo config of its task.

    Args:
        name (str): Path of the config, or name of one of ours.

    Returns:
        tuple[str, Config]: The task, and the config to train.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If it is for none of the three tasks, or has another backbone.
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
    demo.pop('arch')  # it is in the backbone now
    return task, demo


def set_length(cfg: Config, length: int) -> None:
    """Make a demo training shorter or longer, with its learning rate.

    Args:
        cfg (Config): The config; changed in place.
        length (int): Epochs, or iterations where the config counts those.
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


def read_log(run: Run, work: Path) -> None:
    """Read loss and metric from what the training wrote.

    Args:
        run (Run): Where to put them.
        work (Path): Work folder of the training.

    Raises:
        DemoError: If the log has no validation.
    """
    task = TASKS[run.task]
    log = max(work.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    run.loss = [(line['step'], line['loss']) for line in lines if 'loss' in line]
    metrics = [line[task.metric] for line in lines if task.metric in line]
    if not metrics:
        raise DemoError(f'{log} has no {task.metric}: the training did not come to a validation')
    run.metric = metrics[-1] * task.percent


def train(run: Run, cfg: Config, out: Path, threads: int) -> None:
    """Train a config, unless that was done before, and read what came out.

    Args:
        run (Run): What to train.
        cfg (Config): Its config, at the size of the demo.
        out (Path): Folder for everything that is written.
        threads (int): CPU threads to use.
    """
    folder = out / f'{run.name}-{run.seed}'
    folder.mkdir(parents=True, exist_ok=True)
    config, note = folder / 'config.py', folder / 'seconds.txt'
    text = cfg.pretty_text
    if not (note.is_file() and config.is_file() and config.read_text() == text):
        demo_data.TASKS[run.task](DATA)
        config.write_text(text)
        start = time.time()
        args = [str(config), '--work-dir', str(folder / 'work')]
        run_tool('train', args, folder / 'train.log', threads)
        note.write_text(f'{time.time() - start:.0f}')
    run.seconds = float(note.read_text())
    read_log(run, folder / 'work')


def short_name(name: str) -> str:
    """What of a config's name says which model it is."""
    model = name.split('_8xb')[0]
    return model.removeprefix('td-hm_').removeprefix('ocrnet_')


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw a row for each task: the loss along the training, and the metric reached.

    Args:
        runs (Sequence[Run]): All runs.
        path (Path): The picture to write.
    """
    tasks = [task for task in TASKS if any(run.task == task for run in runs)]
    figure, axes = plt.subplots(
        len(tasks), 2, figsize=(11, 3.4 * len(tasks)), squeeze=False, layout='constrained'
    )
    for (curve, bars), task in zip(axes, tasks):
        names = list(dict.fromkeys(run.name for run in runs if run.task == task))
        lowest = 100.0
        for i, name in enumerate(names):
            of_name = [run for run in runs if run.name == name]
            for run in of_name:
                label = short_name(name) if run is of_name[0] else None
                curve.plot(*zip(*run.loss), color=f'C{i}', lw=1.2, label=label)
            metrics = [run.metric for run in of_name]
            mean, lowest = sum(metrics) / len(metrics), min(lowest, *metrics)
            bars.barh(i, mean, color=f'C{i}')
            bars.plot(metrics, [i] * len(metrics), 'k.', ms=4)
            bars.annotate(f' {mean:.1f}', (max(metrics), i), va='center')
        curve.set(xlabel='iteration', ylabel='training loss', title=TASKS[task].title, yscale='log')
        curve.legend(fontsize='small')
        curve.grid(alpha=0.3)
        bars.set_yticks(range(len(names)), [short_name(name) for name in names])
        bars.invert_yaxis()
        bars.set_xlim(max(0, lowest - max(5, (100 - lowest) / 2)), 103)
        bars.set(xlabel=f'{TASKS[task].metric_title}, %', title='reached (dots: seeds)')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(names: Sequence[str], out: Path, lengths: Mapping, seeds: Sequence[int]) -> list[Run]:
    """Train configs and draw the comparison.

    Args:
        names (Sequence[str]): Paths of configs, or names of ours.
        out (Path): Folder for everything that is written.
        lengths (Mapping): Length of the training by task; those left out are as in the demo.
        seeds (Sequence[int]): Seeds to train each with.

    Returns:
        list[Run]: What came out.
    """
    configs = {Path(name).stem: demo_config(name) for name in names}
    threads = int(os.environ.get('OMP_NUM_THREADS', len(os.sched_getaffinity(0))))
    runs = [Run(name, task, seed) for seed in seeds for name, (task, _) in configs.items()]
    for run in runs:
        cfg = configs[run.name][1]
        cfg.randomness.seed = run.seed
        if lengths.get(run.task):
            set_length(cfg, lengths[run.task])
        train(run, cfg, out, threads)
        title = TASKS[run.task].metric_title
        print(f'{run.name}, seed {run.seed}: {title} {run.metric:.1f} % ({run.seconds:.0f} s)')
    results = [dict(vars(run), loss=run.loss[-1][1]) for run in runs]
    (out / 'results.json').write_text(json.dumps(results, indent=2))
    draw(runs, out / 'comparison.png')
    return runs


def main() -> None:
    """Compare the configs named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', help='paths of configs, or names of ours')
    parser.add_argument('--out', type=Path, default=Path('comparison'), help='folder to write to')
    parser.add_argument('--epochs', type=int, help='of classification and pose; as in the demo')
    parser.add_argument('--iters', type=int, help='of segmentation; as in the demo')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='to train each with')
    args = parser.parse_args()
    lengths = dict(cls=args.epochs, pose=args.epochs, seg=args.iters)
    try:
        compare(args.configs, args.out.resolve(), lengths, args.seeds)
    except (DemoError, ImportError, OSError, ValueError) as err:
        sys.exit(f'compare.py: {err}')
    print(f'drawn: {args.out / "comparison.png"}')


if __name__ == '__main__':
    main()
