"""Two processes on the CPU: launchers, lost processes, and memory in a long run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import long_run
import pytest
from places import ENV, ROOT, Place

from mmhrformer.cli.launch import stock_tool
from mmhrformer.configs import find_config

pytestmark = pytest.mark.e2e

MICRO = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
CONFIGS = {
    'mmpretrain': 'hrformer-demo_1xb64-6e_digits',
    'mmpose': 'td-hm_hrformer-demo_1xb16-2e_figures-96x128',
    'mmseg': 'ocrnet_hrformer-demo_1xb16-100_scenes-96x96',
}
# Neither the images nor the batches can be shared evenly. Each process has 4, 4, 4 and 3 digits;
# 4 and 3 people; 4 and 3 scenes, twice.
SHORT = {
    'mmpretrain': ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=29'],
    'mmpose': ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=13'],
    'mmseg': [
        'train_cfg.max_iters=4',
        'train_cfg.val_interval=4',
        'train_dataloader.dataset.indices=13',
        'train_dataloader.sampler.type=DefaultSampler',
    ],
}
LAST = {'mmpretrain': '[1][4/4]', 'mmpose': '[1][2/2]', 'mmseg': '[4/4]'}
METRICS = {'mmpretrain': 'accuracy/top1', 'mmpose': 'coco/AP', 'mmseg': 'mIoU'}
ALWAYS = [
    'train_dataloader.batch_size=4',
    'val_dataloader.dataset.indices=5',
    'default_hooks.logger.interval=1',
    'model.backbone.norm_cfg.type=SyncBN',
]
ON_CPUS = [
    'env_cfg.dist_cfg.backend=gloo',
    'model_wrapper_cfg.type=mmhrformer.CPUDistributedDataParallel',
]
LOOPBACK = dict(MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo')
TIMEOUT = 60  # seconds that a process waits for another one
BOUND = 180  # seconds in which everything has to end, on a busy machine, too


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def torchrun() -> list[str]:
    options = ['--nproc_per_node', '2', '--master_addr', '127.0.0.1', '--master_port', free_port()]
    return [sys.executable, '-m', 'torch.distributed.run', *options]


def train(framework: str, work_dir: Path, *options: str) -> list[str]:
    """Script and arguments of a training on CPUs."""
    script = str(ROOT / 'tools/train.py')
    config = str(find_config(CONFIGS[framework]))
    args = ['--launcher', 'pytorch', '--work-dir', str(work_dir)]
    return [script, config, *args, '--cfg-options', *ALWAYS, *ON_CPUS, *options]


def assert_trained(said: str, framework: str) -> None:
    assert 'Distributed launcher: pytorch' in said
    assert 'GPU number: 2' in said  # what mmengine calls the processes
    losses = re.findall(r'\(train\).* loss: (\S+)', said)
    assert len(losses) == int(LAST[framework].rstrip(']').split('/')[1])
    assert all(float(loss) < 100 for loss in losses)
    assert f'(train) {LAST[framework]}' in re.sub(r' +', ' ', said).replace('[ ', '[')
    assert re.search(rf'\(val\).* {METRICS[framework]}: ', said)


# In `make test`, ours trains pose, and the stock one classification.
@pytest.mark.parametrize(
    'framework',
    [
        pytest.param('mmpretrain', marks=pytest.mark.slow),
        'mmpose',
        pytest.param('mmseg', marks=pytest.mark.slow),
    ],
)
def test_launcher(clone: Place, framework):
    """The agent of torch, and our train.py."""
    options = [*SHORT[framework], f'env_cfg.dist_cfg.timeout={BOUND}']
    said = clone.run(*torchrun()[1:], *train(framework, clone.cwd / framework, *options))
    assert_trained(said, framework)


@pytest.mark.parametrize('framework', ['mmpretrain', pytest.param('mmseg', marks=pytest.mark.slow)])
def test_stock_launcher(clone: Place, framework):
    """The framework's own train.py, which has to be told that there is no device."""
    _, *args = train(framework, clone.cwd / f'stock-{framework}', *SHORT[framework])
    script = ['env', 'LOCAL_RANK=-1', sys.executable, str(stock_tool(framework, 'train'))]
    said = clone.run(*torchrun()[1:], '--no-python', *script, *args)
    assert_trained(said, framework)


@pytest.mark.slow
def test_mim_launches_two_processes(clone: Place):
    config = str(find_config(CONFIGS['mmpretrain']))
    args = ['--gpus', '2', '--launcher', 'pytorch', '--port', free_port()]
    args += ['--work-dir', str(clone.cwd / 'mim'), '--cfg-options', *ALWAYS, *ON_CPUS]
    said = clone.run('-m', 'mim', 'train', 'mmhrformer', config, *args, *SHORT['mmpretrain'])
    assert_trained(said, 'mmpretrain')


# ---------------------------------------------------------------- lost processes


def poll(condition: Callable[[], object], seconds: float = BOUND) -> bool:
    """Wait until a condition holds; whether it ever did."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False


@dataclass
class Run:
    """A running command with all that it started.

    Args:
        process (subprocess.Popen): The command, the leader of a session.
        log (Path): File with its output.
    """

    process: subprocess.Popen
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(errors='replace')

    def trains(self) -> bool:
        """Whether the third iteration is done."""
        return bool(re.search(r'\(train\)\s*\[1\]\[\s*3/', self.said))

    def members(self) -> list[int]:
        """Processes of the session that are alive."""
        found = []
        for folder in Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):
                state, _, _, session = (folder / 'stat').read_text().rpartition(')')[2].split()[:4]
                if int(session) == self.process.pid and state not in 'ZX':
                    found.append(int(folder.name))
        return found

    def workers(self) -> dict[str, int]:
        """Rank -> process, of the training processes that an agent started."""
        found = {}
        for pid in self.members():
            with contextlib.suppress(OSError):
                folder = Path('/proc', str(pid))
                environment = (folder / 'environ').read_text().split('\0')
                ranks = [word[5:] for word in environment if word.startswith('RANK=')]
                parent = int((folder / 'stat').read_text().rpartition(')')[2].split()[1])
                if ranks and parent == self.process.pid:
                    found[ranks[0]] = pid
        return found


@pytest.fixture
def start(clone: Place, tmp_path) -> Iterator[Callable[..., Run]]:
    """Starts commands; nothing of them is left after the test."""
    runs = []

    def start(command: list[str], **env: str) -> Run:
        log = tmp_path / f'{len(runs)}.log'
        with log.open('w') as file:
            process = subprocess.Popen(
                command,
                cwd=clone.cwd,
                env={**ENV, **LOOPBACK, **env},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        runs.append(Run(process, log))
        return runs[-1]

    yield start
    for run in runs:
        for pid in run.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()


def long_training(work_dir: Path) -> list[str]:
    """With data loading workers, which must also exit."""
    timeout = f'env_cfg.dist_cfg.timeout={TIMEOUT}'
    return train('mmpretrain', work_dir, 'train_cfg.max_epochs=1', timeout)


@pytest.fixture
def pair(start, tmp_path) -> list[Run]:
    """Two training processes that nobody looks after."""
    env = dict(WORLD_SIZE='2', MASTER_PORT=free_port())
    command = [sys.executable, *long_training(tmp_path / 'work')]
    runs = [start(command, RANK=rank, LOCAL_RANK=rank, **env) for rank in '01']
    assert poll(runs[0].trains, 3 * BOUND), runs[0].said[-3000:]
    return runs


def assert_ends(run: Run, message: str) -> None:
    """It exits in time, with an error status and a message, and without leftover processes."""
    assert run.process.wait(BOUND) != 0
    assert re.search(message, run.said), run.said[-3000:]
    assert poll(lambda: not run.members()), run.members()


def test_a_process_is_killed_under_an_agent(start, tmp_path):
    victim = '1'
    run = start([*torchrun(), *long_training(tmp_path / 'work')])
    assert poll(run.trains, 3 * BOUND), run.said[-3000:]
    workers = run.workers()
    assert set(workers) == {'0', '1'}
    os.kill(workers[victim], signal.SIGKILL)
    assert_ends(run, rf'rank\s*: {victim} (.*\n)*.*Signal 9 \(SIGKILL\) received by PID')


@pytest.mark.slow
def test_a_process_is_killed(pair):
    """The other one hears of it from the connection, without waiting for the timeout."""
    pair[0].process.kill()
    assert_ends(pair[1], r'RuntimeError: .*(closed by peer|reset by peer|Broken pipe)')
    assert poll(lambda: not pair[0].members())


@pytest.mark.slow
def test_a_process_does_not_answer(pair):
    """The other one waits as long as ``env_cfg.dist_cfg.timeout`` says."""
    pair[1].process.send_signal(signal.SIGSTOP)
    assert_ends(pair[0], rf'RuntimeError: .*Timed out waiting {TIMEOUT}000ms')


# ---------------------------------------------------------------- a long run


@pytest.mark.slow
def test_nothing_grows():
    """For long runs: ``python tests/long_run.py --iterations 2000``."""
    figures = long_run.train(120, batch_size=2, arch=MICRO)
    assert not figures.complaints(), figures
