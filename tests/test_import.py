"""Importing the package registers what it has, and does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

from places import ENV, ROOT

# What the packages do that it is built on is none of its business.
WATCHED = """
import json, os, sys
import cv2, mmcv.transforms, mmengine.hub, mmengine.runner, torch, yaml
import mmengine.visualization
did = []

class Watched(list):
    def __getattribute__(self, name):
        did.append(f'argv.{name}')
        return super().__getattribute__(name)
    def __getitem__(self, key):
        did.append('argv[]')
        return super().__getitem__(key)
    def __iter__(self):
        did.append('iter(argv)')
        return super().__iter__()

def watch(event, args):
    if event == 'open':
        mode, flags = args[1], args[2]
        written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if written and '__pycache__' not in str(args[0]):
            did.append(f'{event} {args[0]}')
        elif str(args[0]).endswith(('.yml', '.json', '.pth', '.pt')):
            did.append(f'{event} {args[0]}')
    elif event.startswith(('os.putenv', 'os.unsetenv', 'socket.', 'subprocess.', 'os.system')):
        did.append(f'{event} {args}')
    elif event == 'import' and args[0] == 'triton':  # a second that only GPUs are worth
        did.append(event)

sys.addaudithook(watch)
environment, threads = dict(os.environ), torch.get_num_threads()
sys.argv = Watched(['train.py', 'config.py', '--launcher', 'pytorch', 'env'])
sys.orig_argv = Watched(['python', '-m', 'mmhrformer', 'env'])
path = list(sys.path)
import mmhrformer
found = list(did)
print(json.dumps(dict(
    did=found,
    environment=environment == dict(os.environ),
    path=path == sys.path,
    threads=threads == torch.get_num_threads(),
)))
"""


def test_importing_does_nothing_else():
    """An environment as under a launcher, on a machine without a GPU."""
    env = dict(ENV, RANK='0', LOCAL_RANK='0', WORLD_SIZE='2', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-c', WATCHED]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.count('\n') == 1  # nor does it print
    assert json.loads(done.stdout) == dict(did=[], environment=True, path=True, threads=True)
