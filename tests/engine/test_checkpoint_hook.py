"""Checkpoints that survive kills and full disks."""

from __future__ import annotations

import errno
import locale
import os
from pathlib import Path

import pytest
import torch
from small_runs import GivenScores, NoisyNumbers, log, make_runner, names, pointed, train

from mmhrformer.checkpoints.reading import find_damage
from mmhrformer.engine import checkpoint_hook
from mmhrformer.engine.checkpoint_hook import (
    CheckpointError,
    DeferredDeleteBackend,
    SafeCheckpointHook,
    find_newest,
)


def full_disk(monkeypatch, fits: int = 0) -> None:
    """Let the disk be full after some more files."""
    room = iter(range(fits))
    sync = os.fsync

    def fsync(file) -> None:
        if not os.path.isdir(f'/proc/self/fd/{file}') and next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, 'fsync', fsync)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / 'epoch_1.pth'
    torch.save(dict(state_dict=dict(weight=torch.rand(1000)), meta=dict(epoch=1)), path)
    return path


@pytest.mark.parametrize(
    ('files', 'named', 'expected', 'damaged'),
    [
        ('1+ 2+ 3+', 3, 3, []),
        ('1+ 2+ 3-', 3, 2, [3]),
        ('1- 2- 3-', 3, None, [3, 2, 1]),
        ('2+ 3+', None, 3, []),  # killed before last_checkpoint was written for the first time
        ('9+ 10+', None, 10, []),  # by number, not by name
        ('1+ 2+ | 3+', 2, 3, []),  # killed after the checkpoint, before last_checkpoint
        ('1+ 2+ | 3-', 2, 2, [3]),
        ('1+ 2+ 8+ 9+', 2, 2, []),  # 8 and 9 are of an earlier run in the same folder
        ('1+ 2- 8+ 9+', 2, 1, [2]),
        ('1+ 2+', 3, 2, []),  # the one that is named is gone
        ('', 3, None, []),
        ('', None, None, []),
    ],
)
def test_newest_whole_checkpoint(checkpoint, tmp_path, files, named, expected, damaged):
    """Files in the order they were written, + whole, - torn, | last_checkpoint."""
    folder = tmp_path / 'work'
    folder.mkdir()
    pointer = folder / 'last_checkpoint'
    if named:
        pointer.write_text(str(folder / f'epoch_{named}.pth'))
        os.utime(pointer, ns=(0, 10))
    for file in files.replace('|', '').split():
        path = folder / f'epoch_{file[:-1]}.pth'
        path.write_bytes(checkpoint.read_bytes()[: None if file[-1] == '+' else 300])
        late = '|' in files and file in files.split('|')[1]
        os.utime(path, ns=(0, 20 if late else 5))
    newest, found = find_newest(folder, 'epoch_{}.pth', pointer)
    assert newest == (expected and folder / f'epoch_{expected}.pth')
    assert [path.name for path in found] == [f'epoch_{n}.pth' for n in damaged]


def test_a_checkpoint_elsewhere_is_found_by_last_checkpoint(checkpoint, tmp_path):
    pointer = tmp_path / 'last_checkpoint'
    pointer.write_text(str(checkpoint))
    assert find_newest(tmp_path / 'none', 'iter_{}.pth', pointer) == (checkpoint, {})


# ---------------------------------------------------------------- resuming


def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path):
    whole = train(tmp_path / 'whole')
    train(tmp_path / 'cut', 14)
    os.truncate(tmp_path / 'cut/epoch_3.pth', 500)
    resumed = train(tmp_path / 'cut', resume=True)
    assert f'{tmp_path}/cut/epoch_3.pth is damaged' in log(tmp_path / 'cut')
    assert resumed == {step: whole[step] for step in range(8, 16)}
    assert find_damage(tmp_path / 'cut/epoch_3.pth') == ''


def test_a_torn_last_checkpoint_is_no_obstacle(tmp_path):
    train(tmp_path, 9)
    (tmp_path / 'last_checkpoint').write_text('')
    assert sorted(train(tmp_path, resume=True))[0] == 8


@pytest.mark.parametrize('torn', [False, True])
def test_without_a_whole_checkpoint_training_starts_from_the_beginning(tmp_path, torn):
    train(tmp_path, 6 if torn else 2)
    for path in tmp_path.glob('*.pth'):
        os.truncate(path, 500)
    assert sorted(train(tmp_path, resume=True)) == list(range(16))
    assert 'training starts from scratch' in log(tmp_path)
    assert ('epoch_1.pth is damaged' in log(tmp_path)) == torn


@pytest.mark.parametrize('damage', ['there is no such file', 'File is not a zip file'])
def test_a_checkpoint_that_was_named_is_not_replaced_by_another(tmp_path, damage):
    train(tmp_path, 9)
    path = tmp_path / 'epoch_2.pth'
    if 'zip' in damage:
        os.truncate(path, 500)
    else:
        path.unlink()
    message = f'load_from={str(path)!r}: {damage}.*{tmp_path}/epoch_1.pth'
    with pytest.raises(ValueError, match=message):
        make_runner(tmp_path, resume=True, load_from=str(path)).train()


def test_a_checkpoint_that_was_named_is_used(tmp_path):
    train(tmp_path, 14)
    assert sorted(train(tmp_path, resume=True, load_from=str(tmp_path / 'epoch_1.pth')))[0] == 4


def test_last_checkpoint_is_written_as_mmengine_reads_it(tmp_path, monkeypatch):
    """The file uses the encoding of the locale, which on Windows is not UTF-8."""
    monkeypatch.setattr(locale, 'getpreferredencoding', lambda *args: 'iso-8859-1')
    train(tmp_path / 'dé')
    pointer = tmp_path / 'dé' / 'last_checkpoint'
    assert Path(pointer.read_text(encoding='iso-8859-1')).is_file()


def test_another_folder_for_the_checkpoints(tmp_path):
    hook = dict(out_dir=str(tmp_path / 'far'))
    train(tmp_path / 'run', 14, hook=hook)
    assert names(tmp_path / 'far/run') == ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth']
    os.truncate(tmp_path / 'far/run/epoch_3.pth', 500)
    assert sorted(train(tmp_path / 'run', hook=hook, resume=True))[0] == 8


def test_what_a_kill_left_behind_is_removed(tmp_path):
    train(tmp_path, 9)
    for name in ('epoch_3.pth.7.partial', 'best_score_epoch_1.pth.7.partial', 'mine.partial'):
        (tmp_path / name).write_text('half')
    train(tmp_path, resume=True)
    assert names(tmp_path, '*.partial') == ['mine.partial']


# ---------------------------------------------------------------- saving


def test_old_checkpoints_go_after_the_new_one_is_there(tmp_path, monkeypatch):
    hook = dict(max_keep_ckpts=2)
    train(tmp_path / 'whole', hook=hook)
    assert names(tmp_path / 'whole') == ['epoch_3.pth', 'epoch_4.pth']
    full_disk(monkeypatch, fits=4)  # two checkpoints, and twice last_checkpoint
    with pytest.raises(CheckpointError):
        make_runner(tmp_path / 'full', hook=hook).train()
    assert names(tmp_path / 'full') == ['epoch_1.pth', 'epoch_2.pth']


def test_a_run_killed_before_removing_removes_when_it_resumes(tmp_path, monkeypatch):
    hook = dict(max_keep_ckpts=2)

    def die(*args) -> None:
        raise KeyboardInterrupt

    runner = make_runner(tmp_path, hook=hook)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_hook.DeferredDeleteBackend, 'remove', die)
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    assert names(tmp_path) == ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth']
    train(tmp_path, 13, hook=hook, resume=True)
    assert names(tmp_path) == ['epoch_2.pth', 'epoch_3.pth']


def test_the_best_checkpoint_goes_after_the_better_one_is_noted(tmp_path, monkeypatch):
    hook = dict(save_best='score', rule='greater')
    train(tmp_path / 'whole', hook=hook, val_evaluator=GivenScores([1, 3, 2, 4]))
    assert names(tmp_path / 'whole', 'best*') == ['best_score_epoch_4.pth']
    # Twice in an epoch, the checkpoint is written again to note the best one: what is missing here
    # is the second time of epoch 2.
    full_disk(monkeypatch, fits=2 + 1 + 2 + 2 + 1)
    runner = make_runner(tmp_path / 'full', hook=hook, val_evaluator=GivenScores([1, 3, 2, 4]))
    with pytest.raises(CheckpointError, match=r'good checkpoint, .*epoch_2\.pth, is intact'):
        runner.train()
    best = ['best_score_epoch_1.pth', 'best_score_epoch_2.pth']
    assert names(tmp_path / 'full', 'best*') == best
    hub = torch.load(tmp_path / 'full/epoch_2.pth')['message_hub']
    assert Path(hub['runtime_info']['best_ckpt']).name == best[0]


def test_a_file_written_anew_under_an_outdated_name_stays(tmp_path):
    """Such as a best checkpoint that is overwritten by the next one."""
    backend, new, old = DeferredDeleteBackend(), tmp_path / 'new.pth', tmp_path / 'old.pth'
    for path in (new, old):
        path.write_bytes(b'old')
        backend.remove(path)
    backend.put(b'new', new)
    assert names(tmp_path) == ['new.pth', 'old.pth']
    backend.remove_outdated()
    assert names(tmp_path) == ['new.pth']
    assert new.read_bytes() == b'new'


def test_a_full_disk_stops_training_and_says_what_is_left(tmp_path, monkeypatch):
    whole = train(tmp_path / 'whole')
    work = tmp_path / 'full'
    with monkeypatch.context() as patch:
        full_disk(patch, fits=4)
        with pytest.raises(CheckpointError) as caught:
            make_runner(work).train()
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value) == (
        f'[Errno 28] No space left on device while writing the checkpoint to {work}/'
        f'epoch_3.pth. Training stops. The last good checkpoint, {work}/epoch_2.pth, is intact: '
        'fix the cause and continue with --resume'
    )
    assert names(work) == ['epoch_1.pth', 'epoch_2.pth']
    assert pointed(work) == 'epoch_2.pth'
    resumed = train(work, resume=True)
    assert resumed == {step: whole[step] for step in range(8, 16)}


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    full_disk(monkeypatch)
    with pytest.raises(CheckpointError, match='There is no earlier checkpoint'):
        make_runner(tmp_path).train()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    'options', [dict(backend_args=dict(backend='local')), dict(out_dir='s3://bucket/runs')]
)
def test_other_storage_is_left_to_mmengine(options):
    hook = SafeCheckpointHook(**options)
    assert not hook.safe
    assert hook.backend_args == options.get('backend_args')


def test_other_storage_is_written_as_before(tmp_path):
    hook = dict(backend_args=dict(backend='local'), max_keep_ckpts=1)
    train(tmp_path, 9, hook=hook)
    assert names(tmp_path) == ['epoch_2.pth']
    assert sorted(train(tmp_path, hook=hook, resume=True))[0] == 8


# ---------------------------------------------------------------- not only training


@pytest.mark.parametrize('by_epoch', [True, False])
def test_validation_and_test_alone_give_the_metrics(tmp_path, by_epoch):
    hook = dict(save_best='score', rule='greater', max_keep_ckpts=1)
    options = dict(
        hook=hook,
        by_epoch=by_epoch,
        test_dataloader=dict(
            batch_size=8, sampler=dict(type='DefaultSampler', shuffle=False), dataset=NoisyNumbers()
        ),
        test_cfg=dict(),
        test_evaluator=GivenScores([5]),
    )
    runner = make_runner(tmp_path, val_evaluator=GivenScores([9, 1, 2, 3, 2, 9]), **options)
    assert runner.val() == dict(score=9)
    assert runner.test() == dict(score=5)
    assert names(tmp_path) == []
    runner.train()
    best = 'best_score_epoch_3.pth' if by_epoch else 'best_score_iter_12.pth'
    assert names(tmp_path, 'best*') == [best]  # not measured against the score before training
    assert runner.val() == dict(score=9)


def test_training_without_validation_or_schedule(tmp_path):
    runner = make_runner(tmp_path, hook=dict(save_best='score', rule='greater'))
    assert runner.param_schedulers is None
    runner.train()
    assert pointed(tmp_path) == 'epoch_4.pth'
