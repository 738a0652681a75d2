"""Checkpoints that stay intact even if training is killed."""

from __future__ import annotations

import contextlib
import locale
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from ..checkpoints.reading import find_damage
from ..registry import HOOKS
from ..utils.files import PARTIAL, write_atomically
from .resume_report import kept_by_resume

BACKEND = 'mmhrformer.atomic'
POINTER = 'last_checkpoint'  # mmengine's file with the path of the newest checkpoint


class AtomicBackend(LocalBackend):
    """Backend for local files with atomic writes, see :mod:`mmhrformer.utils.files`.

    In configs it is ``backend='mmhrformer.atomic'``.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file; its folder is created if needed."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text to a file; its folder is created if needed."""
        self.put(obj.encode(encoding), filepath)


register_backend(BACKEND, AtomicBackend, force=True)


class DeferredDeleteBackend(AtomicBackend):
    """Backend that keeps outdated files until ``remove_outdated``: mmengine removes them early."""

    def __init__(self) -> None:
        self.outdated: dict[str, int] = {}

    def remove(self, filepath: str | Path) -> None:
        self.outdated[str(filepath)] = os.stat(filepath).st_ino

    def remove_outdated(self) -> None:
        """Remove them now, except those that have been overwritten by new files."""
        for path, inode in self.outdated.items():
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == inode:
                    os.remove(path)
        self.outdated.clear()


def find_newest(folder: Path, template: str, pointer: Path) -> tuple[Path | None, dict[Path, str]]:
    """Find the newest intact checkpoint of a run.

    Usually that is the one named in ``last_checkpoint``; a later one, if the run was killed before
    updating that file; or an earlier one, if the file is damaged. Files of an earlier, longer run
    in the same folder are ignored: their steps are higher, but they are older than
    ``last_checkpoint``.

    Args:
        folder (Path): Folder of the checkpoints.
        template (str): Template of their names, with ``{}`` for the step.
        pointer (Path): The file ``last_checkpoint``.

    Returns:
        tuple: The checkpoint, or None if none is intact; and the damage of newer ones.
    """
    before, after = (re.escape(part) for part in re.split(r'\{.*?\}', template))
    step = {
        path: int(found[1])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (found := re.fullmatch(f'{before}(\\d+){after}', path.name))
    }
    named = pointer.read_text(errors='replace').strip() if pointer.is_file() else ''
    if found := re.fullmatch(f'{before}(\\d+){after}', Path(named).name):
        last, noted = int(found[1]), pointer.stat().st_mtime_ns
        step = {p: n for p, n in step.items() if n <= last or p.stat().st_mtime_ns > noted}
    candidates = sorted(step, key=step.get, reverse=True)
    if named and Path(named).exists() and Path(named).name not in {p.name for p in candidates}:
        candidates.insert(0, Path(named))
    damaged = {}
    for path in candidates:
        damage = find_damage(path)
        if not damage:
            return path, damaged
        damaged[path] = damage
    return None, damaged


class CheckpointError(OSError):
    """A checkpoint could not be written; the message names the last one and the remedy."""


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, made safe against kills, crashes and full disks.

    - A checkpoint is written to a temporary file, flushed to disk and renamed, and so is
      ``last_checkpoint``: files with these names are always complete.
    - Older checkpoints are removed (``max_keep_ckpts``, ``save_best``) only after the new one has
      been written. The disk needs space for one more than are kept.
    - ``--resume`` resumes from the newest intact checkpoint: damaged ones are skipped with a
      warning. If there is none, training starts from scratch, and the log says so. A specified file
      (``--resume FILE``, ``load_from``) that is damaged or missing is an error.
    - If a checkpoint cannot be written, training stops, and the error names the last good one.
    - Resuming takes the optimizer's options and the schedule from the checkpoint; a warning lists
      those that differ from the config.

    Remote checkpoints (``backend_args``, or an ``out_dir`` such as ``s3://...``) and those of the
    ``FlexibleRunner`` (FSDP, DeepSpeed) are written by mmengine as usual.

    Args:
        *args: As for ``CheckpointHook``.
        **kwargs: As for ``CheckpointHook``.

    Examples:
        >>> from mmengine.registry import HOOKS
        >>> hook = HOOKS.build(dict(type='mmhrformer.SafeCheckpointHook', max_keep_ckpts=3))
        >>> hook.max_keep_ckpts
        3
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        remote = self.backend_args or self.file_client_args or '://' in str(self.out_dir)
        self.safe = not remote
        if self.safe:
            self.backend_args = dict(backend=BACKEND)
        self.file_backend = None  # until training starts

    def before_run(self, runner: Runner) -> None:
        """Choose the checkpoint to resume from, before the runner looks for it.

        Args:
            runner (Runner): The runner.

        Raises:
            ValueError: If the specified checkpoint is missing or damaged.
        """
        super().before_run(runner)
        if self.safe and not isinstance(runner, Runner):
            self.safe, self.backend_args = False, None
        if not self.safe or not runner._resume or runner._has_loaded:
            return
        problem = [self._prepare_resume(runner) if is_main_process() else None]
        broadcast_object_list(problem)  # also a barrier before the others read last_checkpoint
        if problem[0]:
            raise ValueError(problem[0])

    def _prepare_resume(self, runner: Runner) -> str:
        """Point ``last_checkpoint`` to the newest intact checkpoint; return a problem, if any."""
        folder, pointer = self._folder(runner), Path(runner.work_dir, POINTER)
        newest, damaged = find_newest(folder, self.filename_tmpl, pointer)
        if runner._load_from is not None:
            return _check_named(runner._load_from, newest)
        for path, damage in damaged.items():
            runner.logger.warning(f'The checkpoint {path} is damaged ({damage}): skipped.')
        if newest is None:
            pointer.unlink(missing_ok=True)
            runner.logger.warning(
                f'resume: there is no intact checkpoint in {folder}, training starts from scratch.'
            )
            return ''
        if not pointer.is_file() or pointer.read_text(errors='replace') != str(newest):
            runner.logger.warning(f'The newest intact checkpoint is {newest}: resuming from it.')
            write_atomically(pointer, _encode_path(str(newest)))
        return ''

    def _folder(self, runner: Runner) -> Path:
        """Folder of the checkpoints, which mmengine's hook sets only when training starts."""
        if self.out_dir is None or self.out_dir == runner.work_dir:
            return Path(runner.work_dir)
        return Path(self.out_dir, Path(runner.work_dir).name)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Warn about options that are taken from the checkpoint, not from the config.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): The loaded checkpoint.
        """
        resumes = isinstance(runner, Runner) and runner._resume
        if not resumes or not isinstance(runner.optim_wrapper, OptimWrapper):
            return  # weights only, or not in training
        lines = kept_by_resume(runner, checkpoint)
        if lines:
            runner.logger.warning(
                'resume restores the optimizer and the schedule of the checkpoint, which override '
                'the config:\n  ' + '\n  '.join(lines) + '\nTo start from its weights only, with '
                'the options of the config: load_from=CHECKPOINT, without resume.'
            )

    def before_train(self, runner: Runner) -> None:
        """Remove unfinished files of killed runs.

        Args:
            runner (Runner): The runner.
        """
        super().before_train(runner)
        if not self.safe:
            return
        self.file_backend = DeferredDeleteBackend()
        if is_main_process():
            pattern = f'*{Path(self.filename_tmpl).suffix}.*{PARTIAL}'
            for path in sorted(Path(self.out_dir).glob(pattern)):
                runner.logger.info(f'Removing {path}, left behind by a killed run.')
                path.unlink()
            for path in Path(runner.work_dir).glob(f'{POINTER}.*{PARTIAL}'):
                path.unlink()

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        if not self.safe:
            super()._save_checkpoint_with_step(runner, step, meta)
            return
        kept = list(self.keep_ckpt_ids) if self.max_keep_ckpts > 0 else []
        if self.max_keep_ckpts > 0 and step not in kept:
            # The checkpoint still lists the outdated one, which is removed after writing: after a
            # kill in between, the resumed run removes it.
            kept.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        with _explain_failure(runner, self.last_ckpt):
            runner.save_checkpoint(
                self.out_dir,
                name,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                write_atomically(Path(runner.work_dir, POINTER), _encode_path(self.last_ckpt))
        self._remove_outdated(runner, kept)

    def _remove_outdated(self, runner: Runner, kept: list[int]) -> None:
        """Remove the checkpoints that the one just written replaces."""
        if self.max_keep_ckpts > 0:
            for step in kept[: -self.max_keep_ckpts]:
                path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))
                if is_main_process() and self.file_backend.isfile(path):
                    self.file_backend.remove(path)
            self.keep_ckpt_ids = deque(kept[-self.max_keep_ckpts :], self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self.file_backend.remove_outdated()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if self.file_backend is None:
            return  # `Runner.val()` without training has nothing to save
        if not self.safe:
            super()._save_best_checkpoint(runner, metrics)
            return
        with _explain_failure(runner, f'best checkpoint in {self.out_dir}'):
            super()._save_best_checkpoint(runner, metrics)
        self.file_backend.remove_outdated()


def _encode_path(text: str) -> bytes:
    """Encode ``last_checkpoint`` in the locale's encoding, as mmengine reads it."""
    return text.encode(locale.getpreferredencoding(False), 'surrogateescape')


@contextlib.contextmanager
def _explain_failure(runner: Runner, what: str) -> Iterator[None]:
    """Convert write errors to a CheckpointError that names the last good checkpoint."""
    try:
        yield
    except CheckpointError:  # already explained: best and newest may be written together
        raise
    except OSError as err:
        pointer = Path(runner.work_dir, POINTER)
        last = pointer.read_text(errors='replace') if pointer.is_file() else ''
        left = f'The last good checkpoint, {last}, is intact: fix the cause and continue with'
        start = 'There is no earlier checkpoint: fix the cause and start again, with or without'
        raise CheckpointError(
            err.errno,
            f'{err.strerror or err} while writing the checkpoint to {what}. Training stops. '
            f'{left if last else start} --resume',
        ) from err


def _check_named(name: str, newest: Path | None) -> str:
    """The problem with resuming from a specified checkpoint, or an empty string."""
    path = Path(name).expanduser()
    if '://' in str(name):
        return ''
    damage = find_damage(path) if path.exists() else 'there is no such file'
    hint = f'--resume without a file resumes from {newest}' if newest else 'specify another file'
    return damage and f'resume from load_from={str(name)!r}: {damage}. Fix: {hint}'
