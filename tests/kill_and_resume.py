"""Kill a training again and again, resume it, and compare it with one that was left alone.

    python tests/kill_and_resume.py FOLDER --kills 20     # about 10 minutes on one CPU core
    python tests/kill_and_resume.py FOLDER --disk-full    # on a file system of 24 MB; Linux

The demo of classification is trained, shortened, with everything random that it has: the order of
the data, the augmentations of two persistent workers, dropped paths. SIGKILL comes at random
moments, every other time from the run itself when it has written half of a checkpoint or of
``last_checkpoint``; now and then the newest checkpoint is cut in half as well. Each time
``--resume`` must go on from the newest checkpoint that is whole. When a run comes to its end before
all kills are done, the next one begins in another folder.

The data have to be there: ``python demo/demo_data.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
CONFIG = 'hrformer-demo_1xb64-6e_digits'
IMAGES = {'train': list(range(0, 1397, 30)), 'val': list(range(0, 400, 40))}
OPTIONS = [
    'train_cfg.max_epochs=8',
    'train_cfg.val_interval=8',
    'train_dataloader.batch_size=12',
    'train_dataloader.num_workers=2',
    *(
        f'{split}_dataloader.dataset.indices={str(images).replace(" ", "")}'
        for split, images in IMAGES.items()
    ),
    'model.backbone.drop_path_rate=0.2',
    'default_hooks.logger.interval=1',
]
TOLERANCE = 1e-6
# Runs a script that kills itself and its workers in the middle of the file of some number.
KILLED_WHILE_WRITING = """
import os, runpy, signal, sys
from mmhrformer.engine import checkpoint_hook
from mmhrformer.utils.files import whole_file
_, number, *sys.argv = sys.argv

def write_half(path, data, files=iter(range(int(number)))):
    with whole_file(path) as file:
        if next(files, None) is not None:
            file.write(data)
            return
        file.write(data[:len(data) // 2])
        file.flush()
        os.killpg(0, signal.SIGKILL)

checkpoint_hook.write_atomically = write_half
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@dataclass
class Tally:
    """Statistics of all runs."""

    kills: int = 0
    while_writing: int = 0
    before_resuming: int = 0
    cut: int = 0
    passed_over: int = 0
    resumed_from: list[int] = field(default_factory=list)
    rounds: int = 0
    difference: float = 0.0
    weights: float = 0.0


def train(work: Path, seconds: float | None = None, files: int | None = None) -> tuple[int, str]:
    """Train, or go on with it, until it ends or is killed.

    Args:
        work (Path): Working folder of the run.
        seconds (float, optional): When to kill it. Defaults to None: never.
        files (int, optional): Number of the file in the middle of which it kills itself, usually
            0 for a checkpoint, 1 for the ``last_checkpoint`` after it, and so on. Defaults to
            None: it does not.

    Returns:
        tuple: Exit status, and what was said.
    """
    start = [] if files is None else ['-c', KILLED_WHILE_WRITING, str(files)]
    command = [*start, 'tools/train.py', CONFIG, '--work-dir', str(work), '--resume']
    log = work.with_suffix('.log')
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore')
    with log.open('w') as out:
        process = subprocess.Popen(
            [sys.executable, *command, '--cfg-options', *OPTIONS],
            cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the workers, too
            process.wait()
    return process.returncode, log.read_text()


def newest_whole(work: Path) -> tuple[int, list[Path]]:
    """Load all checkpoints; return the last epoch, 0 if there is none, and the damaged files."""
    epochs, damaged = [0], []
    for path in work.glob('epoch_*.pth'):
        try:
            checkpoint = torch.load(path, map_location='cpu')
            epochs.append(checkpoint['meta']['epoch'])
        except Exception:  # whatever torch finds wrong with half a file
            damaged.append(path)
    return max(epochs), damaged


def losses(work: Path) -> dict[int, list[float]]:
    """Collect what the runs in a folder have logged: iteration -> the losses."""
    found: dict[int, list[float]] = {}
    for path in sorted(work.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            if line.endswith('}') and 'loss' in (values := json.loads(line)):
                found.setdefault(values['step'], []).append(values['loss'])
    return found


def weights(work: Path) -> dict[str, torch.Tensor]:
    """Read the weights that a run ended with."""
    last = Path((work / 'last_checkpoint').read_text())
    return torch.load(last, map_location='cpu')['state_dict']


def compare(work: Path, reference: Path, tally: Tally) -> None:
    """Compare every loss that was ever logged, and the weights at the end."""
    wanted, got = losses(reference), losses(work)
    if set(wanted) != set(got):
        raise AssertionError(f'{work}: logged iterations differ, {sorted(set(wanted) ^ set(got))}')
    worst = max(abs(loss - wanted[step][0]) for step in got for loss in got[step])
    tally.difference = max(tally.difference, worst)
    ours, theirs = weights(work), weights(reference)
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    tally.weights = max(tally.weights, worst)


def check_resumed(said: str, epoch: int, cut: list[Path], tally: Tally) -> None:
    """Check what a run has resumed from, if it came that far."""
    warned = [path for path in cut if f'{path} is damaged' in said]
    for path in warned:  # once: from then on last_checkpoint names another one
        cut.remove(path)
    tally.passed_over += len(warned)
    resumed = re.search(r'resumed epoch: (\d+), iter', said)
    anew = 'training starts from scratch' in said
    if not resumed and not anew:
        tally.before_resuming += 1
        return
    started = int(resumed[1]) if resumed else 0
    if started != epoch:
        raise AssertionError(f'resumed from epoch {started} instead of {epoch}:\n{said}')
    if cut:
        raise AssertionError(f'no warning for {cut}:\n{said}')
    tally.resumed_from.append(started)


def cut_newest(work: Path, tally: Tally) -> list[Path]:
    """Damage the newest checkpoint, as a crash of the whole machine may; return it."""
    newest = work / f'epoch_{newest_whole(work)[0]}.pth'
    if not newest.exists():
        return []
    os.truncate(newest, newest.stat().st_size // 2)
    tally.cut += 1
    return [newest]


def run_once(
    work: Path, rng: random.Random, kills: int, duration: float, cut: list[Path], tally: Tally
) -> bool:
    """Train until the end or the next kill; return whether it was killed."""
    epoch, damaged = newest_whole(work)
    seconds, files = None, None
    if tally.kills < kills and tally.kills % 2:
        files = rng.randrange(4)
    elif tally.kills < kills:
        seconds = rng.uniform(0, duration)
    status, said = train(work, seconds, files)
    check_resumed(said, epoch, cut, tally)
    if status not in (0, -signal.SIGKILL):
        raise AssertionError(said)
    if status:
        tally.kills += 1
        if files is not None and not any(work.glob('*.partial')):
            raise AssertionError(f'{work}: no file was being written')
        tally.while_writing += files is not None
        if set(newest_whole(work)[1]) - set(damaged):
            raise AssertionError(f'{work}: a kill has left a damaged checkpoint')
        if tally.kills % 5 == 0:
            cut += cut_newest(work, tally)
    print(f'{work.name}: from epoch {epoch}, status {status}, {tally}', flush=True)
    return status != 0


def kill_and_resume(folder: Path, kills: int, seed: int) -> Tally:
    """Do it all.

    Args:
        folder (Path): Where to work; it must not exist.
        kills (int): How often to kill.
        seed (int): Of the moments.

    Returns:
        Tally: What happened.

    Raises:
        AssertionError: If anything is not as it was without a kill.
    """
    folder.mkdir(parents=True)
    rng, tally, reference = random.Random(seed), Tally(), folder / 'reference'
    start = time.monotonic()
    status, said = train(reference)
    if status:
        raise AssertionError(said)
    duration = time.monotonic() - start
    while tally.kills < kills:
        tally.rounds += 1
        work = folder / f'round_{tally.rounds}'
        cut: list[Path] = []
        while run_once(work, rng, kills, duration, cut, tally):
            pass
        if any(work.glob('*.partial')):
            raise AssertionError(f'{work}: unfinished files are left')
        compare(work, reference, tally)
    return tally


def fill_disk(folder: Path) -> Tally:
    """Train on a file system with room for two checkpoints, then give it more and go on.

    Args:
        folder (Path): Where to work; it must not exist.

    Returns:
        Tally: What happened.

    Raises:
        AssertionError: If the message or what is left is not as it should be.
    """
    disk = folder / 'disk'
    disk.mkdir(parents=True)
    tally, reference = Tally(rounds=1), folder / 'reference'
    status, said = train(reference)
    if status:
        raise AssertionError(said)
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=24m', 'tmpfs', disk], check=True)
    try:
        status, said = train(disk / 'run')
        print(said.splitlines()[-1])
        last = disk / 'run/epoch_2.pth'
        if status in (0, -signal.SIGKILL) or f'The last good checkpoint, {last}, is' not in said:
            raise AssertionError(f'status {status}, no clear message:\n{said}')
        if newest_whole(disk / 'run') != (2, []) or any((disk / 'run').glob('*.partial')):
            raise AssertionError('the checkpoints before are not intact, or an unfinished one is')
        subprocess.run(['mount', '-o', 'remount,size=100m', disk], check=True)
        status, said = train(disk / 'run')
        if status:
            raise AssertionError(said)
        check_resumed(said, 2, [], tally)
        compare(disk / 'run', reference, tally)
    finally:
        subprocess.run(['umount', disk], check=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folder', type=Path, help='a new folder to work in')
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--disk-full', action='store_true', help='fill a disk instead')
    args = parser.parse_args()
    if args.disk_full and os.geteuid():  # an own name space, in which we may mount
        os.execvp('unshare', ['unshare', '-Urm', sys.executable, *sys.argv])
    folder = args.folder.resolve()
    tally = fill_disk(folder) if args.disk_full else kill_and_resume(folder, args.kills, args.seed)
    print(tally)
    if max(tally.difference, tally.weights) > TOLERANCE:
        sys.exit('the resumed runs differ from the one that was left alone')
    shutil.rmtree(folder)


if __name__ == '__main__':
    main()
