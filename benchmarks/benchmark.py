"""Measure speed and memory of our models and of their peers.

All candidates run in one process and take turns: round after round, each is timed once, in an
order that rotates. The figures of a candidate are the median of its rounds, with the lower and
upper quartile. Its speed-up is given twice: the median of the baseline divided by its own median,
and the median over the rounds of the baseline's time divided by its own time in the same round;
the latter is the better one on a machine that others use, too. Where several sizes, batches or
windows are measured, all of them take turns, and `growth` is a candidate's time per pixel
divided by its time per pixel in the first case, again as the median over the rounds.

Before anything is timed, candidates with the same weights (ours in all its variants, and mmpose's
HRFormer, which gets our weights under its names) must compute the same: outputs within 1e-4 of
their range in float32 and, for training, gradients within 1 % of their norm.

A step is a forward pass of backbone, neck and heads (--mode infer), or that, a mean-square loss
against fixed random targets, backward and an AdamW step (--mode train); images are random.

Examples:
  python tools/benchmark.py --candidates ours mmpose --batch-size 1 8
  python tools/benchmark.py --mode train --candidates ours ours-with-cp mmpose --memory
  python tools/benchmark.py --startup
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from benchmark_measure import (
    Times,
    peak_memory,
    profile,
    quartiles,
    summarize,
    time_rounds,
    time_snippets,
)
from benchmark_peers import (
    BASES,
    CONFIGS,
    HRFORMER,
    SAME_WEIGHTS,
    SUFFIXES,
    BenchmarkError,
    check_models,
    mmpose_backbone,
    model_config,
    parse_spec,
    stock_path,
    why_unavailable,
)
from benchmark_report import (
    describe_environment,
    load_average,
    print_environment,
    print_results,
)
from benchmark_steps import (
    DTYPES,
    Case,
    Entrants,
    Step,
    make_step,
    prepare_entrants,
)
from mmengine.logging import MMLogger

from mmhrformer.deploy.compile import allow_many_versions

COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')
SIZES = {'pose': (256, 192), 'cls': (224, 224), 'seg': (512, 1024)}


# ---------------------------------------------------------------- what was asked for


def parse_size(text: str) -> tuple[int, int]:
    """Read a size such as ``256x192``, height first."""
    match = re.fullmatch(r'(\d+)x(\d+)', text)
    if not match:
        raise argparse.ArgumentTypeError(f'{text!r}: give height x width, such as 256x192')
    return int(match[1]), int(match[2])


def at_least(lowest: float, kind: type = int) -> Callable[[str], float]:
    """What reads a number that has a lower limit."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is no number') from None
        if not value >= lowest:
            raise argparse.ArgumentTypeError(f'{text}: give {lowest} or more')
        return value

    return parse


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    suffixes = '\n'.join(f'  -{name:<10} {text}' for name, text in SUFFIXES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f'candidates: {", ".join(BASES)}; followed by any of\n{suffixes}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--task', choices=CONFIGS, default='pose')
    add('--arch', choices=('tiny', 'small', 'base'), default='small')
    add('--candidates', nargs='+', default=['ours', 'mmpose'], metavar='NAME', help='see below')
    add('--baseline', metavar='NAME', help='what others are compared with; mmpose, or the first')
    add('--mode', choices=('infer', 'train'), default='infer')
    add('--size', nargs='+', type=parse_size, metavar='HxW', help="the paper's for the task")
    add('--batch-size', nargs='+', type=at_least(1), default=[1], metavar='N')
    add('--window', nargs='+', type=at_least(1), default=[None], metavar='N', help='HRFormer only')
    add('--dtype', choices=DTYPES, default='fp32')
    text = 'how --dtype is reached: the model is cast (default of infer), or autocast (of train)'
    add('--precision-by', choices=('cast', 'autocast'), help=text)
    add('--device', choices=('cpu', 'cuda'), default='cpu')
    add('--threads', nargs='+', type=at_least(1), metavar='N', help='CPU threads, one after other')
    text = 'memory layout of images and weights, for all candidates'
    add('--channels-last', action=argparse.BooleanOptionalAction, default=False, help=text)
    add('--compile-mode', choices=COMPILE_MODES, default='default', help='of torch.compile')
    text = 'train without stochastic depth and dropout, instead of as the configs have them'
    add('--no-drop', action='store_true', help=text)
    add('--rounds', type=at_least(1), default=10, metavar='N')
    add('--warmup', type=at_least(1), default=2, metavar='N', help='untimed calls')
    text = 'of one turn: short steps are repeated'
    add('--min-time', type=at_least(0, float), default=0.2, metavar='SECONDS', help=text)
    add('--memory', action='store_true', help='bytes saved for backward (train) and peak memory')
    add('--profile', action='store_true', help='count operators and kernels, name the slowest')
    text = 'time import and build in fresh processes, instead of steps'
    add('--startup', action='store_true', help=text)
    add('--allow-different', action='store_true', help='time models that do not compute the same')
    add('--json', type=Path, metavar='FILE', help='write everything, raw times included')
    add('--table', action='store_true', help='print the table as Markdown')
    return parser


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line and check what goes together.

    Args:
        argv (list[str], optional): The arguments, if not those of the process.

    Returns:
        argparse.Namespace: The arguments; ``specs`` are the candidates that can be measured,
        ``unavailable`` tells of each other one why not, ``cases`` are the cases.

    Raises:
        SystemExit: If they make no sense; with a message on the standard error.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    args.command = shlex.join(['python', sys.argv[0], *(sys.argv[1:] if argv is None else argv)])
    args.size = args.size or [SIZES[args.task]]
    args.threads = list(dict.fromkeys(args.threads or [torch.get_num_threads()]))
    args.precision_by = args.precision_by or ('cast' if args.mode == 'infer' else 'autocast')
    args.autocast = args.precision_by == 'autocast' and args.dtype != 'fp32'
    args.cases = [Case(s, b, w) for s in args.size for b in args.batch_size for w in args.window]
    args.cases = list(dict.fromkeys(args.cases))
    try:
        choose_candidates(args)
        check_device(args)
        check_sizes(args)
        if args.json and not args.json.absolute().parent.is_dir():
            raise BenchmarkError(f'--json {args.json}: there is no such folder')
        check_models(args.task, args.arch, args.specs)
        if args.startup:
            check_startup(args)
    except BenchmarkError as err:
        parser.error(str(err))
    return args


def choose_candidates(args: argparse.Namespace) -> None:
    """Sort the candidates into those that can be measured and the others; find the baseline."""
    specs = [parse_spec(name) for name in dict.fromkeys(args.candidates)]
    reasons = {
        spec.name: why_unavailable(spec, args.mode, args.device, args.autocast) for spec in specs
    }
    args.specs = [spec for spec in specs if not reasons[spec.name]]
    args.unavailable = {name: reason for name, reason in reasons.items() if reason}
    names = [spec.name for spec in args.specs]
    if not names:
        told = '; '.join(f'{name}: {reason}' for name, reason in args.unavailable.items())
        raise BenchmarkError(f'none of the candidates can be measured: {told}')
    if args.baseline and args.baseline not in names:
        raise BenchmarkError(
            f'--baseline {args.baseline} is not measured: choose from {", ".join(names)}'
        )
    args.baseline = args.baseline or ('mmpose' if 'mmpose' in names else names[0])


def check_device(args: argparse.Namespace) -> None:
    """Refuse a device or a data type that this machine or torch cannot do."""
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise BenchmarkError('--device cuda: torch sees no CUDA device on this machine')
    if args.dtype == 'fp16' and args.device == 'cpu':
        raise BenchmarkError('--dtype fp16 needs --device cuda; on the CPU choose bf16')
    if args.dtype == 'fp16' and args.mode == 'train' and not args.autocast:
        raise BenchmarkError(
            '--dtype fp16 --precision-by cast cannot train, the optimizer would divide by zero: '
            'choose autocast'
        )


def check_sizes(args: argparse.Namespace) -> None:
    """Refuse images that a candidate cannot take."""
    for spec in args.specs:
        # mmpose's and mmseg's HRNets enlarge streams by whole factors; ours takes any size.
        unit = {'ours': 1, 'vit-s': 16, 'vit-b': 16}.get(spec.base, 32)
        for height, width in args.size:
            if min(height, width) < 32:
                raise BenchmarkError(f'--size {height}x{width}: give at least 32x32 pixels')
            if height % unit or width % unit:
                raise BenchmarkError(
                    f'--size {height}x{width}: candidate {spec.name} needs multiples of {unit} '
                    'pixels'
                )


def check_startup(args: argparse.Namespace) -> None:
    """Refuse what has no start-up to compare."""
    others = [spec.name for spec in args.specs if spec.name not in SAME_WEIGHTS]
    if others or args.task != 'pose' or args.arch == 'tiny':
        raise BenchmarkError(
            '--startup compares ours and mmpose, --task pose, --arch small or base: mmpose has '
            'configs of these only'
        )


# ---------------------------------------------------------------- measuring


def measure(args: argparse.Namespace, entrants: Entrants, threads: int) -> list[dict]:
    """Time all candidates in all cases, then look at memory and operators.

    Args:
        args (argparse.Namespace): The arguments.
        entrants (Entrants): The candidates.
        threads (int): CPU threads.

    Returns:
        list[dict]: A row for each case and candidate.
    """
    torch.set_num_threads(threads)
    steps = {
        (case, spec.name): make_step(entrants[spec.name, case.window], case)
        for case in args.cases
        for spec in args.specs
    }
    times = time_rounds(steps, args.rounds, args.warmup, args.min_time, args.device)
    rows = []
    for (case, name), step in steps.items():
        row = dict(candidate=name, threads=threads, **describe(case, name, times, args))
        if args.memory:
            row.update(measure_memory(step, args))
        if args.profile:
            row['profile'] = profile(step, args.device)
        rows.append(row)
    return rows


def describe(
    case: Case, name: str, times: dict[tuple[Case, str], Times], args: argparse.Namespace
) -> dict:
    """What the times say about a candidate in a case."""
    mine, first = times[case, name], args.cases[0]
    row = dict(case=str(case), **asdict(case), **asdict(mine))
    row.update(summarize(mine.seconds, times[case, args.baseline].seconds))
    row['images_per_second'] = case.batch / row['median']
    pairs = zip(mine.seconds, times[first, name].seconds)
    row['growth'] = quartiles([a / b * first.pixels / case.pixels for a, b in pairs])[1]
    return row


def measure_memory(step: Step, args: argparse.Namespace) -> dict[str, int | None]:
    """Bytes of the weights, saved for the backward pass, and at the peak of a step."""
    network = step.entrant.network
    network.zero_grad(set_to_none=True)  # the gradients of a step are part of its peak
    result = dict(weights=sum(p.numel() * p.element_size() for p in network.parameters()))
    if args.mode == 'train':
        result['saved'] = step.saved_bytes()
    # A CUDA graph keeps its memory between its runs.
    captured = step.entrant.spec.has('cudagraph')
    result['peak'] = None if captured else peak_memory(step, args.device)
    return result


BUILD = """from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
cfg = Config.fromfile({!r})
with DefaultScope.overwrite_default_scope('mmpose'):
    MODELS.build(cfg.model)
"""


def startup_snippets(arch: str) -> dict[str, str]:
    """Code that imports and builds, by what it builds.

    Args:
        arch (str): ``'small'`` or ``'base'``.

    Returns:
        dict[str, str]: The code. ``torch`` is what none can do without.
    """
    cfg = model_config(parse_spec('ours'), 'pose', arch, (0, 0), None, True)
    extra = json.loads(json.dumps(mmpose_backbone(cfg.model.backbone)['extra']))
    return {
        'torch': 'import torch',
        'ours backbone': f'from mmhrformer import HRFormer\nHRFormer(arch={arch!r})',
        'mmpose backbone': f'from mmpose.models.backbones import HRFormer\nHRFormer({extra!r})',
        'ours model': BUILD.format(str(cfg.filename)),
        'mmpose model': BUILD.format(str(stock_path('mmpose', HRFORMER.format(arch)))),
    }


def measure_startup(args: argparse.Namespace) -> list[dict]:
    """Time import and build of ours and of mmpose's, in fresh processes.

    Args:
        args (argparse.Namespace): The arguments.

    Returns:
        list[dict]: A row for each.
    """
    threads = args.threads[0]
    seconds = time_snippets(startup_snippets(args.arch), args.rounds, threads)
    rows = []
    for name, mine in seconds.items():
        row = dict(candidate=name, threads=threads, case='import and build', seconds=mine)
        rows.append({**row, **summarize(mine, seconds.get(f'mmpose {name.split()[-1]}', mine))})
    return rows


# ---------------------------------------------------------------- the whole


def run(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Check and measure.

    Args:
        args (argparse.Namespace): The arguments.

    Returns:
        tuple[list[dict], list[dict]]: What the check of equality found, and what was measured.

    Raises:
        BenchmarkError: If candidates do not compute the same.
    """
    if args.startup:
        return [], measure_startup(args)
    if any(spec.has('compiled') for spec in args.specs):
        allow_many_versions(1024)  # for each candidate in each case
    logger = MMLogger.get_current_instance()
    before, level = torch.get_num_threads(), logger.level
    try:
        logger.setLevel('WARNING')
        torch.set_num_threads(args.threads[0])
        entrants, checks = prepare_entrants(args)
        return checks, [row for n in args.threads for row in measure(args, entrants, n)]
    finally:
        torch.set_num_threads(before)
        logger.setLevel(level)


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line asks for.

    Args:
        argv (list[str], optional): The arguments, if not those of the process.

    Returns:
        int: The exit code.
    """
    args = read_arguments(argv)
    facts = describe_environment(args)
    print_environment(facts, args)
    try:
        checks, rows = run(args)
    except BenchmarkError as err:
        print(f'benchmark.py: {err}', file=sys.stderr)
        return 1
    print_results(rows, args)
    facts['load_average_at_end'] = load_average()
    if args.json:
        write_json(args, facts, checks, rows)
    return 0


def write_json(args: argparse.Namespace, facts: dict, checks: list[dict], rows: list[dict]) -> None:
    """Write everything that was found, raw times included."""
    left_out = ('specs', 'cases', 'command', 'json')
    arguments = {name: value for name, value in vars(args).items() if name not in left_out}
    report = dict(command=args.command, arguments=arguments, environment=facts)
    report.update(checks=checks, results=rows)
    # JSON has no infinite difference, as that of outputs of another shape; it becomes text.
    report = json.loads(json.dumps(report), parse_constant=str)
    args.json.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(main())
