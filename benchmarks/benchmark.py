"""Measure speed and memory of HRFormer and of other models.

All candidates run interleaved in one process: in each round, each is timed once, in an order that
rotates. The results of a candidate are the median of its rounds, with the lower and upper
quartile. Its speed-up is given twice: the median of the baseline divided by its own median, and the
median over the rounds of the baseline's time divided by its own time in the same round, which is
more reliable on a shared machine. With several sizes, batches or windows, all of them are
interleaved, and `growth` is a candidate's time per pixel relative to the first case, again as the
median over the rounds.

Before timing, candidates with the same weights (all variants of ours, and mmpose's HRFormer with
our weights under its names) must give the same results: outputs within 1e-4 of their range in
float32 and, for training, gradients within 1 % of their norm.

A step is a forward pass of backbone, neck and heads (--mode infer; below float32, models are cast),
or additionally a mean-square loss against fixed random targets, backward pass and an AdamW step
(--mode train; below float32 with autocast). Images are random.

Examples:
  python -m mmhrformer benchmark --candidates ours mmpose --batch-size 1 8
  python -m mmhrformer benchmark --candidates ours ours-onnx hrnet-w32-onnx --threads 1
  python -m mmhrformer benchmark --mode train --candidates ours ours-with-cp mmpose --memory
  python -m mmhrformer benchmark --startup
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

import benchmark_measure as bm
import benchmark_peers as bp
import benchmark_report as report
import benchmark_steps as bs
import torch
from mmengine.logging import MMLogger

from mmhrformer.deploy.compile import allow_many_versions

COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')
SIZES = {'pose': (256, 192), 'cls': (224, 224), 'seg': (512, 1024)}


# ---------------------------------------------------------------- the command line


def parse_size(text: str) -> tuple[int, int]:
    """Parse a size such as ``256x192``, height first."""
    match = re.fullmatch(r'(\d+)x(\d+)', text)
    if not match:
        raise argparse.ArgumentTypeError(f'{text!r}: expected height x width, such as 256x192')
    return int(match[1]), int(match[2])


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r}: expected a positive integer')
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    suffixes = '\n'.join(f'  -{name:<10} {text}' for name, text in bp.SUFFIXES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f'candidates: {", ".join(bp.BASES)}; each optionally followed by\n{suffixes}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--task', choices=bp.CONFIGS, default='pose')
    add('--arch', choices=('tiny', 'small', 'base'), default='small')
    add('--candidates', nargs='+', default=['ours', 'mmpose'], metavar='NAME', help='see below')
    add('--baseline', metavar='NAME', help='candidate to compare with (mmpose, or the first one)')
    add('--mode', choices=('infer', 'train'), default='infer')
    add('--size', nargs='+', type=parse_size, metavar='HxW', help="(the paper's for the task)")
    add('--batch-size', nargs='+', type=positive, default=[1], metavar='N')
    add('--window', nargs='+', type=positive, default=[None], metavar='N', help='HRFormer only')
    add('--dtype', choices=bs.DTYPES, default='fp32', help='fp16 in inference on CUDA only')
    add('--device', choices=('cpu', 'cuda'), default='cpu')
    add(
        '--threads', type=positive, default=torch.get_num_threads(), metavar='N', help='CPU threads'
    )
    text = 'channels-last images and weights, for all candidates'
    add('--channels-last', action=argparse.BooleanOptionalAction, default=False, help=text)
    add('--compile-mode', choices=COMPILE_MODES, default='default', help='mode of torch.compile')
    text = 'train without the stochastic depth and dropout of the configs'
    add('--no-drop', action='store_true', help=text)
    add('--rounds', type=positive, default=10, metavar='N')
    add('--warmup', type=positive, default=2, metavar='N', help='untimed calls')
    text = 'minimum time of a measurement; short steps are repeated'
    add('--min-time', type=float, default=0.2, metavar='SECONDS', help=text)
    text = 'measure memory kept for the backward pass (train) and peak memory'
    add('--memory', action='store_true', help=text)
    add('--profile', action='store_true', help='count operators and kernels, list the slowest')
    text = 'time import and model building in new processes, instead of steps'
    add('--startup', action='store_true', help=text)
    add('--allow-different', action='store_true', help='time models even if their results differ')
    add('--json', type=Path, metavar='FILE', help='write all results, including raw times')
    add('--table', action='store_true', help='print the table as Markdown')
    return parser


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; adds the candidates as ``specs``, and ``cases``."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.command = shlex.join(['python', sys.argv[0], *(sys.argv[1:] if argv is None else argv)])
    args.size = args.size or [SIZES[args.task]]
    cases = (bs.Case(s, b, w) for s in args.size for b in args.batch_size for w in args.window)
    args.cases = list(dict.fromkeys(cases))
    try:
        args.specs = [bp.parse_spec(name) for name in dict.fromkeys(args.candidates)]
        names = [spec.name for spec in args.specs]
        args.baseline = args.baseline or ('mmpose' if 'mmpose' in names else names[0])
        check(args, names)
        for spec in args.specs:
            check_candidate(spec, args)
        bp.check_models(args.task, args.arch, args.specs)
    except bp.BenchmarkError as err:
        parser.error(str(err))
    return args


def check(args: argparse.Namespace, names: list[str]) -> None:
    """Refuse arguments that conflict, or that this machine does not support."""
    if args.baseline not in names:
        raise bp.BenchmarkError(
            f'--baseline {args.baseline} is not measured: choose from {", ".join(names)}'
        )
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise bp.BenchmarkError('--device cuda: torch sees no CUDA device on this machine')
    if args.dtype == 'fp16' and (args.device == 'cpu' or args.mode == 'train'):
        raise bp.BenchmarkError('--dtype fp16 needs --device cuda and --mode infer; or use bf16')
    if args.json and not args.json.absolute().parent.is_dir():
        raise bp.BenchmarkError(f'--json {args.json}: there is no such folder')
    is_comparable = (
        set(names) <= set(bp.SAME_WEIGHTS) and args.task == 'pose' and args.arch != 'tiny'
    )
    if args.startup and not is_comparable:
        raise bp.BenchmarkError(
            '--startup compares only ours and mmpose, with --task pose, --arch small or base, for '
            'which mmpose has configs'
        )


def check_candidate(spec: bp.Spec, args: argparse.Namespace) -> None:
    """Refuse a candidate that does not support the options or the image sizes."""
    if reason := bp.why_unavailable(spec, args.mode, args.device, args.dtype):
        raise bp.BenchmarkError(f'candidate {spec.name}: {reason}; remove it')
    # mmpose's and mmseg's HRNets upsample by integer factors; ours takes any size.
    unit = {'ours': 1, 'vit-s': 16, 'vit-b': 16}.get(spec.base, 32)
    for height, width in args.size:
        if min(height, width) < 32:
            raise bp.BenchmarkError(f'--size {height}x{width}: expected at least 32x32 pixels')
        if height % unit or width % unit:
            raise bp.BenchmarkError(
                f'--size {height}x{width}: candidate {spec.name} needs multiples of {unit} pixels'
            )


# ---------------------------------------------------------------- measuring


def measure(args: argparse.Namespace, entrants: bs.Entrants) -> list[dict]:
    """Time all candidates in all cases, then measure memory and profile; one row each."""
    steps = {
        (case, spec.name): bs.make_step(entrants[spec.name, case.window], case)
        for case in args.cases
        for spec in args.specs
    }
    found = bm.time_rounds(steps, args.rounds, args.warmup, args.min_time)
    rows = []
    for (case, name), step in steps.items():
        row = describe(case, name, found, args)
        if args.memory:
            row.update(measure_memory(step, args.device))
        if args.profile:
            row['profile'] = bm.profile(step, args.device)
        rows.append(row)
    return rows


def describe(
    case: bs.Case,
    name: str,
    found: dict[tuple[bs.Case, str], bm.Measurement],
    args: argparse.Namespace,
) -> dict:
    """The row of a candidate in a case: its times, and their ratios to the baseline's."""
    mine, seconds = found[case, name], found[case, name].times
    row = dict(candidate=name, case=str(case), **case._asdict(), **mine.metadata)
    row.update(calls=mine.number_per_run, seconds=seconds)
    row.update(bm.summarize(seconds, found[case, args.baseline].times))
    row['images_per_second'] = case.batch / row['median']
    first = args.cases[0]
    growth = [a / b for a, b in zip(seconds, found[first, name].times)]
    row['growth'] = bm.quartiles(growth)[1] * first.pixels / case.pixels
    return row


def measure_memory(step: bs.Step, device: str) -> dict[str, int]:
    """Bytes kept for the backward pass, and peak memory of a step."""
    step.entrant.network.zero_grad(set_to_none=True)  # count gradients in the peak
    result = dict(saved=step.saved_bytes()) if step.entrant.trains else {}
    if not step.entrant.spec.has('cudagraph'):  # a CUDA graph keeps its memory between its runs
        result['peak'] = bm.peak_memory(step, device)
    return result


BUILD = """from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
cfg = Config.fromfile({!r})
with DefaultScope.overwrite_default_scope('mmpose'):
    MODELS.build(cfg.model)
"""


def measure_startup(args: argparse.Namespace) -> list[dict]:
    """Time import and build of our model and mmpose's in new processes; one row each."""
    sizes = (args.size[0], None, True)
    ours, mmpose = (
        bp.model_config(bp.parse_spec(x), 'pose', args.arch, *sizes) for x in bp.SAME_WEIGHTS
    )
    extra = json.loads(json.dumps(mmpose.model.backbone.extra))
    snippets = {
        'torch': 'import torch',  # the lower bound
        'ours backbone': f'from mmhrformer import HRFormer\nHRFormer(arch={args.arch!r})',
        'mmpose backbone': f'from mmpose.models.backbones import HRFormer\nHRFormer({extra!r})',
        'ours model': BUILD.format(str(ours.filename)),
        'mmpose model': BUILD.format(str(bp.stock_path('mmpose', bp.HRFORMER.format(args.arch)))),
    }
    found = bm.time_snippets(snippets, args.rounds, args.threads)
    rows = []
    for name, seconds in found.items():
        row = dict(candidate=name, case='import and build', seconds=seconds)
        peer = found.get(f'mmpose {name.split()[-1]}', seconds)
        rows.append({**row, **bm.summarize(seconds, peer)})
    return rows


# ---------------------------------------------------------------- the whole


def run(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Check equality and measure; return the rows of both."""
    if args.startup:
        return [], measure_startup(args)
    if any(spec.has('compiled') for spec in args.specs):
        allow_many_versions(1024)  # one per candidate and case
    logger = MMLogger.get_current_instance()
    before, level = torch.get_num_threads(), logger.level
    try:
        logger.setLevel('WARNING')
        torch.set_num_threads(args.threads)
        entrants, checks = bs.prepare_entrants(args)
        return checks, measure(args, entrants)
    finally:
        torch.set_num_threads(before)
        logger.setLevel(level)


def main(argv: list[str] | None = None) -> int:
    """Check, measure and report; returns the exit code."""
    args = read_arguments(argv)
    facts = report.describe_environment(args)
    report.print_environment(facts, args)
    try:
        checks, rows = run(args)
    except bp.BenchmarkError as err:
        print(f'benchmark.py: {err}', file=sys.stderr)
        return 1
    report.print_results(rows, args)
    facts['load_average_at_end'] = report.load_average()
    if args.json:
        write_json(args, facts, checks, rows)
    return 0


def write_json(args: argparse.Namespace, facts: dict, checks: list[dict], rows: list[dict]) -> None:
    """Write all results, including raw times."""
    left_out = ('specs', 'cases', 'command', 'json')
    arguments = {name: value for name, value in vars(args).items() if name not in left_out}
    found = dict(command=args.command, arguments=arguments, environment=facts)
    # JSON has no infinity, as for outputs of different shapes; write it as text.
    found = json.dumps(dict(found, checks=checks, results=rows))
    args.json.write_text(json.dumps(json.loads(found, parse_constant=str), indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(main())
