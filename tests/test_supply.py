"""The promises of SECURITY.md about importing, and the composition of the environments."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import places

# What mmhrformer imports of others is imported before anybody watches.
OTHERS = """
import mmcv.cnn, mmengine.hub, mmengine.optim, mmengine.runner, mmengine.visualization, torch
"""
WATCH = """
import json, os, sys

sys.dont_write_bytecode = True
seen = []
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.link', 'os.symlink', 'os.chmod',
           'os.truncate', 'shutil.', 'tempfile.')
PROCESSES = ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork')

def watch(event, args):
    if event.startswith(('socket.', *CHANGES, *PROCESSES)):
        seen.append([event, str(args[:1])])
    elif event == 'open' and args[2] & WRITING:
        seen.append([event, str(args[0])])

sys.addaudithook(watch)
"""
USE = """
import mmhrformer
mmhrformer.list_models()
model = mmhrformer.HRFormer('tiny')
mmhrformer.load_checkpoint(model, model.state_dict())
"""


def events(code: str, before: str = '') -> list[list[str]]:
    """Side effects of code in a fresh process: connections, file changes, other processes."""
    code = f'{before}{WATCH}{code}\njson.dump(seen, sys.stdout)'
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=places.ROOT,
        env=places.ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_and_building_opens_no_socket_and_writes_no_file():
    assert events(USE, before=OTHERS) == []


def test_the_watch_sees_what_it_is_for(tmp_path):
    code = f"""
import socket, subprocess
open({str(tmp_path / 'a')!r}, 'w').close()
os.mkdir({str(tmp_path / 'b')!r})
socket.socket().connect_ex(('127.0.0.1', 9))
subprocess.run([sys.executable, '--version'], stdout=subprocess.DEVNULL)
"""
    names = {name for name, _ in events(code)}
    assert names >= {'open', 'os.mkdir', 'socket.connect', 'subprocess.Popen'}


def test_installed_packages_fit_together():
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'check'],
        env=dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK='1', PIP_NO_INDEX='1'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert 'No broken requirements found' in done.stdout


def test_every_requirement_is_pinned():
    lines = (places.ROOT / 'requirements/classic.txt').read_text().splitlines()
    required = [line for line in lines if line.strip() and not line.lstrip().startswith('#')]
    assert len(required) > 50
    loose = [
        line for line in required if not re.match(r'[\w.-]+(\[[\w,]+\])?==[\w.!+]+( ;|$)', line)
    ]
    assert loose == []
