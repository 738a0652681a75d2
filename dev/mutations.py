"""The mutations of dev/mutate.py: description, original text and replacement.

Each is a plausible mistake that changes what the package computes, saves or refuses, and should be
caught by the tests that mirror its file. The texts are short, so that they still apply when the
code around them changes; ``python dev/mutate.py --check`` lists those that do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Mutation(NamedTuple):
    """A small mistake.

    Attributes:
        name (str): The file without ``mmhrformer/`` and ``.py``, and a description.
        file (str): The file, relative to the checkout.
        tests (tuple[str, ...]): The tests that should fail, as arguments of pytest.
        old (str): The original text, which occurs once in the file.
        new (str): The replacement.
    """

    name: str
    file: str
    tests: tuple[str, ...]
    old: str
    new: str


def of(file: str, tests: str, *rows: tuple[str, str, str]) -> Iterator[Mutation]:
    """Mutations of a file.

    Args:
        file (str): The file, relative to the checkout.
        tests (str): The tests that should fail, relative to ``tests``, separated by spaces.
        *rows (tuple[str, str, str]): Description, original text and replacement of each.

    Yields:
        Mutation: Each of them.
    """
    place = file.removeprefix('mmhrformer/').removesuffix('.py')
    paths = tuple(f'tests/{test}' for test in tests.split())
    for what, old, new in rows:
        yield Mutation(f'{place}: {what}', file, paths, old, new)


# fmt: off
MODELS = (
    *of(
        'mmhrformer/models/attention.py', 'models/test_attention.py',
        ('columns of the position bias not flipped', '.flip(3, 4)', '.flip(3)'),
        ('position bias with y and x of the query exchanged',
         'permute(2, 0, 1, 3, 4)', 'permute(2, 1, 0, 3, 4)'),
        ('logits scaled by all channels', 'head_dim**-0.5', 'self.embed_dims**-0.5'),
        ('padding not masked', "float('-inf')", '0.0'),
        ('padding masked where there is none', 'self.pad_mask and not divided',
         'self.pad_mask and divided'),
        ('mask of windows repeated by window, not by image',
         'mask.repeat(qkv.shape[0] // mask.shape[0], 1)',
         'mask.repeat_interleave(qkv.shape[0] // mask.shape[0], 0)'),
        ('heads before query, key and value', '3, num_heads, head_dim)',
         'num_heads, 3, head_dim).transpose(2, 3)'),
        ('bias table starts ten times too large', 'std=0.02', 'std=0.2'),
    ),
    *of(
        'mmhrformer/models/ffn.py', 'models/test_ffn.py',
        ('no GELU at the end', 'ops.norm_gelu_conv(x, self.norm3)', 'self.norm3(x)'),
        ('first normalization used twice', 'self.norm2, self.fc2)', 'self.norm1, self.fc2)'),
        ('stride forgotten', 'weight, bias, stride)', 'weight, bias, 1)'),
        ('stride of the rows for both axes', '((stride, stride), ', '(self.stride, '),
        ('bias forgotten', 'weight, bias, stride)', 'weight, None, stride)'),
    ),
    *of(
        'mmhrformer/models/block.py', 'models/test_block.py',
        ('wrong normalization before the attention',
         'ops.fork_layer_norm(x, self.norm1)', 'ops.fork_layer_norm(x, self.norm2)'),
        ('another epsilon', 'self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)',
         'self.norm1 = nn.LayerNorm(embed_dims)'),
        ('FFN never dropped', 'self.ffn(y), self.drop_path)',
         'self.ffn(y), nn.Identity())'),
        ('no recomputation in training', 'if self.with_cp:',
         'if self.with_cp and not self.training:'),
        ('no residual in the bottleneck', 'out + self.downsample(x)', 'out'),
        ('padding mask not handed on', 'with_rpe=with_rpe, pad_mask=pad_mask', 'with_rpe=with_rpe'),
    ),
    *of(
        'mmhrformer/models/hr_module.py', 'models/test_hrformer.py test_parity.py',
        ('odd sizes corrected with the other alignment',
         "aligned = self.upsample == 'nearest'", "aligned = self.upsample != 'nearest'"),
        ('ReLU after the last halving', '[] if is_last else', '[] if not is_last else'),
        ('streams enlarged by 2, 4, 6', '2 ** max(0, j - i)', 'max(1, 2 * (j - i))'),
    ),
    *of(
        'mmhrformer/models/hrformer.py',
        'models/test_hrformer.py models/test_ordinary_module.py::'
        'test_streams_come_in_the_memory_format_of_the_images',
        ('drop path falls with depth',
         'linspace(0, drop_path_rate,', 'linspace(drop_path_rate, 0,'),
        ('one stage too few is frozen', 'self.frozen_stages + 1]', 'self.frozen_stages]'),
        ('frozen stages go on counting statistics',
         'module.eval()\n            module.requires_grad_(False)', 'module.requires_grad_(False)'),
        ('heads of another arch', '(2, 4, 8, 16)', '(1, 2, 4, 8)'),
        ('parameters outside are beyond the last layer',
         'startswith(prefix):\n            return num_layers - 1,',
         'startswith(prefix):\n            return num_layers,'),
        ('added modules belong to the stem',
         'else:\n            return num_layers - 1,', 'else:\n            return 0,'),
        ('exchange belongs to the first block', 'else num_blocks - 1', 'else 0'),
        ('norm_eval the wrong way round', 'if self.norm_eval:', 'if not self.norm_eval:'),
        ('streams in the other memory format',
         'if is_contiguous else', 'if not is_contiguous else'),
        ('streams sorted', 'for i in self.out_indices)', 'for i in sorted(self.out_indices))'),
    ),
    *of(
        'mmhrformer/models/checks.py', 'models/test_hrformer.py test_bad_input.py',
        ('negative streams counted from the one before the last',
         'index + NUM_STREAMS if', 'index + NUM_STREAMS - 1 if'),
        ('flat images accepted', 'MIN_INPUT or x.shape[3]', 'MIN_INPUT and x.shape[3]'),
        ('probability of 1 accepted', '0 <= value < 1)', '0 <= value <= 1)'),
    ),
    *of(
        'mmhrformer/models/fusion_neck.py', 'models/test_fusion_neck.py',
        ('finer streams forgotten', 'widen(x) + halve(total)', 'widen(x)'),
        ('no bias in front of the normalization', 'cin, stride=2)', 'cin, stride=2, bias=False)'),
        ('coarsest stream first', 'zip(xs[1:], self', 'zip(xs[:0:-1], self'),
    ),
    *of(
        'mmhrformer/models/ocr_head.py', 'models/test_ocr_head.py',
        ('regions by a softmax over the classes', 'logits.flatten(2).softmax(-1)',
         'logits.flatten(2).softmax(1)'),
        ('attention by a softmax over the pixels', '* self.scale).softmax(-1)',
         '* self.scale).softmax(1)'),
        ('scaled by the channels of the pixels', 'self.scale = key_channels**-0.5',
         'self.scale = channels**-0.5'),
        ('pixels before their context', '[context, pixels]', '[pixels, context]'),
        ('logits used twice', '_LOSSES.pop(head, lambda', '_LOSSES.get(head, lambda'),
        ('logits of other inputs used',
         'losses is not None and losses.origin[0] == origin_of(head, inputs)[0]',
         'losses is not None'),
        ('twice the dropout', 'dropout_ratio: float = 0.05', 'dropout_ratio: float = 0.1'),
    ),
    *of(
        'mmhrformer/models/losses.py', 'models/test_losses.py',
        ('mean of the hard pixels over all pixels', 'losses * counts, counts.sum()',
         'losses * counts, torch.ones_like(losses).sum()'),
        ('one pixel too few kept', 'self.min_kept + 1, len', 'self.min_kept, len'),
        ('first pixel not ranked', 'valid[(0,) * valid.dim()] = True', 'pass'),
        ('threshold is the highest probability', 'clamp(min=self.thresh)',
         'clamp(max=self.thresh)'),
        ('pixel at the bound kept', 'probability < bound', 'probability <= bound'),
        ('mean without class weights', 'self.class_weight.to(losses)[known]', 'weights'),
        ('ignored pixels in the mean', 'if self.avg_non_ignore:', 'if not self.avg_non_ignore:'),
        ('sums in half precision', 'cls_score = at_least_float32(cls_score)', 'pass'),
        ('255 ignored unasked', '-100 if ignore_index is None', '255 if ignore_index is None'),
        ('loss weight forgotten', 'self.loss_weight * (losses', '(losses'),
        ('labels as large as the number of classes accepted', '(label >= classes)',
         '(label > classes)'),
    ),
    *of(
        'mmhrformer/models/seg_tta.py', 'models/test_seg_tta.py',
        ('probabilities added', 'scores = scores.sum(0)', 'scores = scores.softmax(1).sum(0)'),
        ('logits of one channel added', '.mean(0).sigmoid()', '.sum(0).sigmoid()'),
    ),
    *of(
        'mmhrformer/models/ablations/shifted_attention.py',
        'models/ablations/test_shifted_attention.py',
        ('moved on instead of back', 'x.roll((shift, shift)', 'x.roll((-shift, -shift)'),
        ('real tokens hidden from padding', 'padded[:, None] > padded', 'padded[:, None] < padded'),
        ('two corners confused', '2 * rows[:, None] + cols', 'rows[:, None] + cols'),
        ('maps of one window shifted', 'min(size) > self.window_size',
         'min(size) >= self.window_size'),
        ('first place after the end not moved around', 'places >= padded', 'places > padded'),
    ),
    *of(
        'mmhrformer/models/ablations/plain_ffn.py', 'models/ablations/test_ablations.py',
        ('GELU at the end of a transformer FFN',
         'ops.norm_gelu_conv(x, self.norm3) if self.with_norm else x',
         'ops.norm_gelu_conv(x, self.norm3)'),
    ),
    *of(
        'mmhrformer/models/ablations/swin.py', 'models/ablations/test_ablations.py',
        ('FFN never dropped', 'self.drop_path(out.flatten(1, 2))', 'out.flatten(1, 2)'),
    ),
)

CHECKPOINTS = (
    *of(
        'mmhrformer/checkpoints/dialects.py', 'checkpoints/test_dialects.py',
        ('key before query', "('q_proj', 'k_proj', 'v_proj')", "('k_proj', 'q_proj', 'v_proj')"),
        ('bias tables resized with aligned corners', 'align_corners=False', 'align_corners=True'),
        ('heads and offsets of bias tables exchanged',
         'table.T.reshape(1, -1', 'table.reshape(1, -1'),
        ('auxiliary classifier in the second head', "('aux_head.2.', 'decode_head.0.",
         "('aux_head.2.', 'decode_head.1."),
        ('first normalization of the pixels in the second layer',
         "f_pixel.1.0.', 'decode_head.1.object_attention.f_pixel.0.1.",
         "f_pixel.1.0.', 'decode_head.1.object_attention.f_pixel.1.1."),
        ('tables dropped from models that lack them by mistake',
         'if key not in own and not backbone.with_rpe', 'if key not in own'),
        ('two names of a tensor accepted', '    refuse_duplicates(news)\n', ''),
        ('joined and separate projections accepted', 'elif new in olds:', 'elif not olds:'),
        ('large finite weights refused', 'isfinite()) or bool', 'isfinite()) and bool'),
        ('tables with too few rows accepted', '** 2 != len(table)', '** 2 > len(table)'),
    ),
    *of(
        'mmhrformer/checkpoints/contents.py', 'checkpoints/test_contents.py',
        ('compiled models unknown', "'_orig_mod', ", ''),
        ('doubles accepted', '    refuse_duplicates(own)\n', ''),
        ('averaged weights not named so', "'ema|average|swa'", "'ema|swa'"),
        ('first of several models taken',
         'if not all(start.startswith(prefix)', 'if not any(start.startswith(prefix)'),
    ),
    *of(
        'mmhrformer/checkpoints/reading.py', 'checkpoints/test_reading.py',
        ('TorchScript runs', 'if _is_torchscript(data):', 'if not data:'),
        ('any type of torch is built', "(isinstance(found, type) and 'Storage' in name)",
         'isinstance(found, type)'),
        ('checksums not looked at',
         'if damage := find_damage(io.BytesIO(data))', "if damage := ''"),
        ('states reach tensors', 'elif isinstance(made, Tensor):', 'elif made is None:'),
        ('extensions of pickle are looked up', 'def get_extension(', 'def _get_extension('),
        ('nothing said of what is inert', '    if inert:\n', '    if not inert:\n'),
    ),
    *of(
        'mmhrformer/checkpoints/reading.py',
        'test_fuzz.py::test_tensors_marked_as_folders_are_noticed',
        ('entries marked as folders accepted', 'e.is_dir() or e.external_attr & _FOLDER',
         'e.is_dir()'),
    ),
    *of(
        'mmhrformer/checkpoints/reading.py',
        'checkpoints/test_zoo.py::test_whole_hashes_of_the_zoo_are_checked',
        ('hash of the zoo not checked', 'check_hash(path, data, sha256)', 'check_hash(path, data)'),
    ),
    *of(
        'mmhrformer/checkpoints/loading.py',
        'checkpoints/test_loading.py checkpoints/test_scheme.py',
        ('strict only if tensors are missing and unused', 'report.missing or report.unused',
         'report.missing and report.unused'),
        ('tensors of the file counted as used', 'len(own) - len(missing)', 'len(state_dict)'),
        ('remedy for a head told for all of the model', 'all(map(_of_head, wrong))',
         'any(map(_of_head, wrong))'),
        ('new classes excuse the whole model', 'in differing if _of_head(name)]', 'in differing]'),
        ('stored objects handed on to the visualizers', 'dataset_meta and _is_plain(dataset_meta)',
         'bool(dataset_meta)'),
        ('incomplete backbones only mentioned', 'any(not _of_head(name)', 'any(_of_head(name)'),
    ),
    *of(
        'mmhrformer/checkpoints/loading.py', 'test_bad_input.py',
        ('quantized weights accepted', '    if codes:', '    if codes and not own:'),
        ('weights that are not finite accepted', '    check_finite(contents.tensors)\n', ''),
    ),
    *of(
        'mmhrformer/checkpoints/download.py', 'checkpoints/test_download.py',
        ('first digits of the hash are enough', 'if digest.startswith(expected):',
         'if digest.startswith(expected[:8]):'),
        ('dead links tried again', 'if wait is None or not transient:', 'if wait is None:'),
        ('redirects to http followed', "if req.type == 'https' and", "if req.type == 'file' and"),
        ('busy servers not tried again', '408, 429, 500', '408, 500'),
        ('dates taken for hashes', r'(?!20\d\d(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])\.)', ''),
        ('hashes in capitals refused', 'sha256.lower() or', 'sha256 or'),
        ('lost connections not tried again', "TransientError(f'the connection",
         "DownloadError(f'the connection"),
    ),
    *of(
        'mmhrformer/checkpoints/writing.py', 'checkpoints/test_writing.py',
        ('separated projections share memory', '[place].clone()', '[place]'),
        ('existing files overwritten unasked',
         'exists() and not overwrite', 'exists() and overwrite'),
        ('links replaced', 'Path(os.path.realpath(path))', 'Path(path)'),
        ('incomplete heads accepted', 'and complete and all', 'and all'),
        ('derived buffers forgotten', 'spread[buffer] = ', '_ = '),
        ('wrapped as no code does', 'dialect.prefix + key: tensor', 'key: tensor'),
    ),
    *of(
        'mmhrformer/checkpoints/zoo.py', 'checkpoints/test_zoo.py',
        ('files that are here not preferred', '(here or sources)[0]', 'sources[0]'),
        ('backbones taken for whole models', 'source.is_whole or not whole',
         'source.is_whole or whole'),
        ('files in the cache not checked', 'path.read_bytes(), sha256)', "b'', '')"),
        ('origin not regarded', '(origin or source.origin)', 'source.origin'),
    ),
    *of(
        'mmhrformer/utils/files.py', 'utils/test_files.py checkpoints/test_writing.py',
        ('not flushed before it takes the name', '            os.fsync(file.fileno())\n', ''),
        ('unfinished files left', 'unfinished.unlink(missing_ok=True)', 'pass'),
        ('written in place', "Path(f'{path}.{os.getpid()}{PARTIAL}')", 'Path(path)'),
    ),
)

ENGINE = (
    *of(
        'mmhrformer/engine/schedulers.py', 'engine/test_schedulers.py',
        ('warm-up one step too long', 'if step < self.warmup', 'if step <= self.warmup'),
        ('cosine from the end of the warm-up',
         'math.pi * step /', 'math.pi * (step - self.warmup) /'),
        ('end counted from the start of training', '(self.end - self.begin))) / 2',
         'self.end)) / 2'),
        ('warm-up in epochs taken for iterations', 'round(warmup * epoch_length)', 'warmup'),
        ('end factor is a lower bound', 'self.end_factor + (1 - self.end_factor) * cosine',
         'max(self.end_factor, cosine)'),
        ('warm-up as long as the training accepted',
         'warmup < end - begin', 'warmup <= end - begin'),
    ),
    *of(
        'mmhrformer/engine/optim.py', 'engine/test_optim.py',
        ('matrices spared, too', 'parameter.ndim <= 1', 'parameter.ndim <= 2'),
        ('spared only if all rules hold', 'any(NO_DECAY', 'all(NO_DECAY'),
        ('the others spared', 'if exempt:', 'if not exempt:'),
        ('rates one layer too low', 'self.rate**above', 'self.rate**(above + 1)'),
        ('rates rise towards the images', 'layers - 1 - depth', 'depth'),
        ('foreach overruled', "{'fused', 'foreach'} &", "{'fused'} &"),
        ('frozen parameters in the optimizer', ' if p.requires_grad}', '}'),
    ),
    *of(
        'mmhrformer/engine/checkpoint_hook.py', 'engine/test_checkpoint_hook.py',
        ('oldest checkpoint first', 'key=step.get, reverse=True', 'key=step.get'),
        ('checkpoints by name, not number', 'key=step.get,', 'key=str,'),
        ('checkpoints of an earlier run taken', 'st_mtime_ns > noted', 'st_mtime_ns > 0'),
        ('removed before the new one is there',
         'self.outdated[str(filepath)] = os.stat(filepath).st_ino', 'os.remove(filepath)'),
        ('one checkpoint too many kept', 'kept[: -self.max_keep_ckpts]',
         'kept[: -self.max_keep_ckpts - 1]'),
        ('new file under an old name removed', 'if os.stat(path).st_ino == inode:', 'if path:'),
        ('damage of a named checkpoint not looked at', 'damage = find_damage(path) if path',
         "damage = '' if path"),
        ('last_checkpoint of a damaged run left', 'pointer.unlink(missing_ok=True)', 'pass'),
        ('last_checkpoint in UTF-8', 'locale.getpreferredencoding(False)', "'utf-8'"),
    ),
    *of(
        'mmhrformer/engine/seed_hook.py', 'engine/test_seed_hook.py',
        ('samplers do not know the epoch',
         'sampler.set_epoch(runner.epoch)', 'sampler.set_epoch(0)'),
        ('samplers keep the seed of a new run', 'sampler.seed = runner.seed', 'pass'),
        ('persistent workers go on', 'loader._iterator = None', 'pass'),
        ('every epoch has the same augmentations', '(runner.seed, runner.epoch, get_rank())',
         '(runner.seed, 0, get_rank())'),
        ('every process has the same augmentations',
         'runner.epoch, get_rank())', 'runner.epoch, 0)'),
        ('start of the workers forgotten after an epoch', 'init = init.args[1]', 'init = None'),
    ),
    *of(
        'mmhrformer/engine/resume_report.py', 'engine/test_resume_report.py',
        ('switches reported', 'saved_group.keys() - SWITCHES', 'saved_group.keys()'),
        ('rates of the moment reported', "g.get(f'initial_{key}', g[key])", 'g[key]'),
        ('longer training not told', 'now > max(ends)', 'now < max(ends)'),
        ('number of schedules not compared', 'len(built) != len(saved)', 'len(built) < len(saved)'),
    ),
    *of(
        'mmhrformer/engine/safe_globals.py', 'engine/test_safe_globals.py',
        ('every method of a known type', 'or name not in METHODS.get(owner, ())',
         'or owner not in METHODS'),
        ('no method of log histories', "HistoryBuffer: ('min', 'max', 'current', 'mean')",
         'HistoryBuffer: ()'),
    ),
    *of(
        'mmhrformer/engine/config_check.py', 'engine/test_config_check.py',
        ('accumulated steps not counted', 'gpus * batch * steps == base', 'gpus * batch == base'),
        ('scaled rates warned of',
         "scale.get('enable') or gpus * batch", 'gpus * batch'),
        ('accumulation with scaled rates accepted', "and steps > 1:", 'and steps > 9:'),
        ('late milestones accepted', '> min(end, length)', '> max(end, length)'),
        ('missing data stop every tool', 'if missing and tool in', 'if missing or tool in'),
        ('tests need a GPU for mixed precision', "training=tool != 'test'", 'training=True'),
        ('one process needs the wrapper', 'if processes > 1 and', 'if processes >= 1 and'),
    ),
    *of(
        'mmhrformer/engine/data_check.py', 'engine/test_config_check.py',
        ('coordinates of tests not compared', "bool(step.get('use_udp')) != udp",
         "bool(step.get('use_udp')) > udp"),
        ('classes of other numbers accepted',
         'if trained.get(name) != i]', 'if name not in trained]'),
        ('addresses are missing files', "if '://' not in path and not Path", 'if not Path'),
        ('datasets that fetch themselves reported', "if dataset.get('download'):",
         "if not dataset.get('download', True):"),
        ('other storage reported', "not in ('local', 'disk') or", "in ('local', 'disk') or"),
        ('swaps of one side accepted', 'if swaps.get(other) != name', 'if other not in swaps'),
    ),
    *of(
        'mmhrformer/engine/dead_options.py', 'engine/test_config_check.py',
        ('folders of a variable are no copy',
         "or (value != '' and other.startswith(value.rstrip('/') + '/'))", ''),
        ('old options unnoticed', 'dead.keys() & REPLACED.keys()', '()'),
        ('equal numbers are copies',
         "(not is_plain or key.endswith(path.split('.')[-1])) and", ''),
        ('other variables not followed', 'if via not in seen:', 'if via is None:'),
        ('a variable uses itself', ' - {target}', ''),
    ),
    *of(
        'mmhrformer/engine/cpu_ddp.py', 'engine/test_cpu_ddp.py',
        ('single processes changed', "{'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} <=", "{'RANK'} <="),
        ('synchronized normalization kept', 'revert_sync_batchnorm(module)', 'module'),
        ('models on GPUs accepted',
         "if devices - {'cpu'}:", "if devices - {'cpu', 'meta', 'cuda'}:"),
    ),
)

CONFIGS = (
    *of(
        'configs/_base_/schedules/coco_210e.py', 'configs/test_recipes.py',
        ('last milestone too early', 'milestones=[170, 200]', 'milestones=[170, 190]'),
        ('warm-up twice as long', 'end=501', 'end=1001'),
        ('bias tables decay', "no_decay=['bias_tables']", 'no_decay=[]'),
    ),
)

DATA = (
    *of(
        'mmhrformer/datasets/transforms.py', 'datasets/test_transforms.py',
        ('aspect ratio in both directions alike',
         'height * scale / stretch', 'height * scale * stretch'),
        ('labels interpolated', "interpolation='nearest'", "interpolation='bilinear'"),
        ('largest brightness never drawn',
         '-self.shift, self.shift + 1', '-self.shift, self.shift'),
        ('bright pixels become dark', "results['img'].astype(np.int16) +", "results['img'] +"),
        ('rotations clipped at one deviation',
         'randn(number).clip(-2, 2)', 'randn(number).clip(-1, 1)'),
        ('rotated where it is not drawn', '< self.rotation_prob', '> self.rotation_prob'),
        ('shared places too far', 'map(min, self._draw(spare), spare)', 'self._draw(spare)'),
        ('border wrapped around', 'if not bounds.min <=', 'if not bounds.min - 1 <='),
        ('border is of class 0', 'np.full(padded, self.seg_pad_val', 'np.full(padded, 0'),
        ('last place never drawn', 'randint(spare[1] + 1)', 'randint(max(spare[1], 1))'),
        ('boxes without a height accepted', '(sizes > 0)).all()', '(sizes >= 0)).all()'),
        ('boxes shifted to one side only',
         'uniform(-self.shift, self.shift', 'uniform(0, self.shift'),
        ('shift of boxes smaller', '+ sizes * shift)', '+ sizes / 1.25 * shift)'),
    ),
    *of(
        'mmhrformer/datasets/meta.py', 'datasets/test_meta.py',
        ('width before height', 'size[::-1] if width_first', 'size if width_first'),
        ('metainfo of the config ignored',
         'kind._load_metainfo(given)', 'kind._load_metainfo({})'),
        ('classes of mmpretrain go before the metainfo',
         "{'classes': classes, **(given or {})}", "{**(given or {}), 'classes': classes}"),
        ('names of another number stored', 'number in (None, len(one))', 'True'),
    ),
    *of(
        'mmhrformer/datasets/meta.py', 'datasets/test_meta.py inferencers/test_seg.py',
        ('classes of another number taken',
         'if names is None and len(found) == num_classes', 'if names is None and found'),
    ),
)

INFERENCERS = (
    *of(
        'mmhrformer/inferencers/arguments.py', 'inferencers/test_arguments.py',
        ('batches of no images accepted', 'or value < 1:', 'or value < 0:'),
        ('bools are batch sizes', 'isinstance(value, bool) or not', 'not'),
    ),
    *of(
        'mmhrformer/inferencers/cls.py',
        'inferencers/test_base.py::test_path_and_array_give_the_same inferencers/test_cls.py',
        ('least likely class', 'label = int(scores.argmax())', 'label = int(scores.argmin())'),
    ),
    *of(
        'mmhrformer/inferencers/seg.py',
        'inferencers/test_base.py::test_path_and_array_give_the_same inferencers/test_seg.py',
        ('runs one pixel early', 'flat[:-1]) + 1]', 'flat[:-1])]'),
        ('smallest area first', 'areas.most_common()', 'areas.most_common()[::-1]'),
        ('opacity ignored', 'alpha = opacity', 'alpha = 0.8'),
    ),
    *of(
        'mmhrformer/inferencers/pose.py', 'inferencers/test_pose.py',
        ('everything but people', 'found.labels == PERSON', 'found.labels != PERSON'),
        ('all scores count', '(found.scores >= self.detector_threshold)', '(found.scores >= 0)'),
        ('width and height accepted', '(array[:, 2] > array[:, 0])', '(array[:, 2] > 0)'),
        ('boxes of the first image for all', 'chain(each, repeat(each[-1]))', 'repeat(each[0])'),
    ),
    *of(
        'mmhrformer/inferencers/base.py', 'inferencers/test_base.py inferencers/test_pose.py',
        ('first result of a batch for all', 'else found[number]', 'else found[0]'),
        ('drawn in BGR', 'displayable(pixels)[..., ::-1]', 'displayable(pixels)'),
        ('heads get bfloat16', 'feature.float() for feature', 'feature for feature'),
        ('one bad image ends the work', 'or len(media) == 1:', 'or len(media) >= 1:'),
    ),
    *of(
        'mmhrformer/inferencers/writer.py', 'inferencers/test_writer.py inferencers/test_base.py',
        ('images of equal stems overwritten', '        self._stems.add(unused)\n', ''),
        ('red and blue exchanged', 'result.drawn[..., ::-1]', 'result.drawn'),
    ),
    *of(
        'mmhrformer/inferencers/image_loading.py', 'inferencers/test_image_loading.py',
        ('frames stay in color', 'picture.is_frame and self.channels == 1',
         'picture.is_frame and not self.channels'),
        ('any floats taken', 'bool(self.step.to_float32 and whole.all())',
         'bool(self.step.to_float32)'),
        ('last three channels drawn', 'image[..., :3] if', 'image[..., -3:] if'),
    ),
    *of(
        'mmhrformer/inferencers/media.py',
        'inferencers/test_media.py inferencers/test_image_loading.py',
        ('downloads left', 'weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)',
         'pass'),
        ('first camera for all', 'int(camera[1] or 0)', '0'),
        ('truncated files accepted', 'decode: bool = True', 'decode: bool = False'),
    ),
    *of(
        'mmhrformer/analysis/complexity.py', 'analysis/test_complexity.py',
        ('FLOPs for multiply-accumulates', 'get_total_flops() // 2', 'get_total_flops()'),
        ('padding not counted', 'window_count(H, side) * window_count(W, side) * side**2',
         'H * W'),
        ('second residual sum forgotten', '2 * out.numel(),', 'out.numel(),'),
    ),
    *of(
        'mmhrformer/hub.py', 'test_hub.py',
        ('incomplete checkpoints accepted', 'content, strict=True)', 'content)'),
        ('model left in training mode', '.to(device).train(False)', '.to(device)'),
        ('synchronized normalization kept', 'revert_sync_batchnorm(MODELS.build(cfg.model))',
         'MODELS.build(cfg.model)'),
    ),
)

COMMANDS = (
    *of(
        'mmhrformer/cli/launch.py', 'cli/test_launch.py',
        ('rank taken for the config',
         "sorted(args, key=lambda arg: arg.startswith(('--local-rank=', '--local_rank=')))",
         'args'),
        ('our scheme left to the stock tool', 'and not checkpoint.startswith(SCHEME)', ''),
        ('folders of tools confused', 'return min(scripts', 'return max(scripts'),
    ),
    *of(
        'mmhrformer/cli/main.py', 'cli/test_main.py',
        ('no command is no error', 'return 0 if args else 2', 'return 0'),
        ('AP not in per cent', "'AP': 100", "'AP': 1"),
        ('copies not put where they shall be', 'options.dest / path.name', 'options.dest / name'),
    ),
    *of(
        'mmhrformer/cli/environment.py', 'cli/test_environment.py',
        ('a broken core is no error', "['works'] else 1", "['works'] else 0"),
    ),
    *of(
        'configs/_base_/schedules/seg_80k.py', 'configs/test_recipes.py',
        ('decay ends an iteration early', 'end=80001', 'end=80000'),
        ('decay begins with the warm-up', 'begin=1500', 'begin=0'),
        ('bias tables decayed', "['vectors', 'bias_tables']", "['vectors']"),
    ),
    *of(
        'configs/_base_/schedules/imagenet_300e.py', 'configs/test_recipes.py',
        ('bias tables not decayed', "['vectors']", "['vectors', 'bias_tables']"),
        ('warm-up of 5 epochs', 'warmup=20', 'warmup=5'),
    ),
    *of(
        'configs/_base_/models/hrformer_ocr.py', 'configs/test_recipes.py',
        ('channels turned', 'bgr_to_rgb=False', 'bgr_to_rgb=True'),
        ('auxiliary loss in full', 'loss_weight=0.4', 'loss_weight=1.0'),
    ),
    *of(
        'configs/_base_/datasets/cityscapes_512x1024.py', 'configs/test_recipes.py',
        ('class weights of two classes exchanged', '0.8373, 0.918,', '0.918, 0.8373,'),
    ),
)

OPS = (
    *of(
        'mmhrformer/ops/windows.py', 'ops/test_windows.py',
        ('odd padding goes first',
         'missing // 2, missing - missing // 2', 'missing - missing // 2, missing // 2'),
        ('windows not in row-major order', 'cols, window, C).transpose(2, 3)', 'cols, window, C)'),
        ('rows and columns of the index exchanged',
         'dy * (2 * window - 1) + dx', 'dx * (2 * window - 1) + dy'),
        ('one window too many', '(size + window - 1) // window', '(size + window) // window'),
    ),
    *of(
        'mmhrformer/ops/reference.py',
        'ops/test_backends.py models/test_attention.py models/test_ffn.py models/test_hrformer.py',
        ('key before query', 'q, k, v = qkv', 'k, q, v = qkv'),
        ('bias scaled instead of the logits', 'torch.add(bias, logits,', 'torch.add(logits, bias,'),
        ('softmax over the queries', 'logits.softmax(-1)', 'logits.softmax(-2)'),
        ('another GELU', 'F.gelu(x.contiguous(memory_format=torch.channels_last))',
         "F.gelu(x.contiguous(memory_format=torch.channels_last), approximate='tanh')"),
        ('bilinear enlarging with aligned corners', "'nearest' else False", "'nearest' else True"),
        ('no ReLU after the exchange', 'return relu(x)', 'return x'),
    ),
    *of(
        'mmhrformer/ops/cpu.py', 'ops/test_backends.py',
        ('every head widened', 'missing if missing * 8 <= head_dim else 0', 'missing'),
        ('zeros returned instead of numbers',
         '[..., :head_dim].flatten(2)', '[..., padding:].flatten(2)'),
    ),
    *of(
        'mmhrformer/ops/recompute.py', 'ops/test_recompute.py models/test_block.py',
        ('other paths dropped the second time', 'in_same_backend(run), *args, use',
         'in_same_backend(run), *args, preserve_rng_state=False, use'),
        ('running statistics updated twice', '        norm.momentum = 0.0\n', ''),
        ('batches counted twice', 'count.clone()', 'count'),
        ('no counter for SyncBatchNorm', 'count.clone()', 'None'),
        ('hooks not noticed', '        or module._forward_pre_hooks\n', ''),
        ('momentum not put back',
         'norm.num_batches_tracked = momentum, count', 'norm.num_batches_tracked = 0.0, count'),
    ),
    *of(
        'mmhrformer/ops/dispatch.py', 'ops/test_backends.py',
        ('fast backends under torch.func', 'is_tracing() or is_transformed()', 'is_tracing()'),
        ('forced backend does not end', 'forced.reset(token)', 'pass'),
    ),
)

DEPLOY = (
    *of(
        'mmhrformer/deploy/fuse.py', 'deploy/test_fuse.py',
        ('shift subtracted', 'plain + weight @ shift', 'plain - weight @ shift'),
        ('padding with the wrong sign', '(-shift / scale)', '(shift / scale)'),
        ('masked padding folded', '            and not attn.pad_mask\n', ''),
        ('queries not scaled', '[head_dim**-0.5, 1, 1]', '[1.0, 1, 1]'),
        ('order of any module trusted', 'filter(calls_in_order, list(model.modules()))',
         'list(model.modules())'),
        ('order of mmcv modules ignored', "'conv norm' not in", "'norm' not in"),
        ('shared convolutions folded',
         'uses[id(before)] == uses[id(child)] == 1', 'uses[id(child)] == 1'),
    ),
    *of(
        'mmhrformer/deploy/map_attention.py', 'deploy/test_onnx.py',
        ('query bias forgotten', 'q @ shift + bias', 'q @ shift'),
        ('shift of the normalization forgotten for keys', ', k @ shift)', ', 0 * (k @ shift))'),
        ('one head: keys and queries swapped', 'k.T @ q', 'q.T @ k'),
        ('value bias forgotten', ' + attn.proj.weight.double() @ values', ''),
        ('mean of normalized tokens scaled wrongly', ' / weight.shape[1]', ' / 2'),
        ('padding merged beside full windows', '(tokens == 0) & ~has_full', 'tokens == 0'),
        ('one padded token counted for all', '.sum(-1, keepdims=True, where=~inside)',
         '.max(-1, keepdims=True, where=~inside, initial=0)'),
    ),
    *of(
        'mmhrformer/deploy/exchange.py', 'deploy/test_exchange.py',
        ('own stream forgotten', 'total.permute(0, 2, 3, 1) + own', 'total.permute(0, 2, 3, 1)'),
        ('finer streams enlarged', 'if j > i:', 'if j < i:'),
    ),
    *of(
        'mmhrformer/deploy/aligned_conv.py', 'deploy/test_onnx.py',
        ('images copied', 'and conv.in_channels >= MIN_CHANNELS', ''),
        ('maps padded along the height', '(0, 0, 0, 0, 0, self.missing)',
         '(0, 0, 0, self.missing, 0, 0)'),
    ),
    *of(
        'mmhrformer/deploy/onnx.py',
        'deploy/test_onnx.py::test_deployed_models_predict_what_the_frameworks_do '
        'deploy/test_onnx.py::test_pixels_are_normalized_as_by_the_data_preprocessor '
        'deploy/test_onnx.py::test_wrong_results_leave_no_file '
        'deploy/test_onnx.py::test_files_say_what_they_take_and_give',
        ('divided before the mean is subtracted',
         '(image - self.mean) / self.std', 'image / self.std - self.mean'),
        ('scores without softmax', 'return out.softmax(-1)', 'return out'),
        ('logits enlarged with the other alignment',
         'align_corners=align)', 'align_corners=not align)'),
        ('tolerance of the numbers, not of the range', 'TOLERANCE * self.range', '1.0'),
    ),
)
# What torch 2.1 lacks: run by `--modern`.
MODERN = (
    *of(
        'mmhrformer/engine/safe_globals.py', 'engine/test_safe_globals.py',
        ('names of NumPy 2 refused', "for core in ('core', '_core')", "for core in ('core',)"),
        ('frozen sets refused', 'ConfigDict, frozenset,', 'ConfigDict,'),
    ),
    *of(
        'mmhrformer/ops/triton_conv.py', 'ops/test_triton_conv.py::test_depthwise',
        ('weight gradient: row of the next tile counted, too', '(i + 1 < ROWS) & ', ''),
        ('weight gradient: rows exchanged', 'above, here = here, below',
         'above, here = below, here'),
        ('weight gradient: rows that Triton takes for one',
         'zero, zero, tl.zeros((COLS, BLOCK_C), tl.float32)', 'zero, zero, zero'),
        ('input gradient with taps not flipped', '-1 if FLIP else 1', '1'),
    ),
    *of(
        'mmhrformer/ops/triton_attention.py',
        'ops/test_triton_attention.py::test_outputs_and_gradients_are_those_of_the_formula',
        ('position bias of keys and queries exchanged', 'dy = q // WIN - k // WIN',
         'dy = k // WIN - q // WIN'),
    ),
    *of(
        'mmhrformer/ops/triton_exchange.py',
        'ops/test_triton_exchange.py::test_as_torch_in_float64',
        ('weights of neighbors exchanged', 'a * (1.0 - weight) + b * weight',
         'a * weight + b * (1.0 - weight)'),
    ),
    *of(
        'mmhrformer/ops/triton_layer_norm.py',
        'ops/test_triton_layer_norm.py::test_small_variances',
        ('epsilon outside the root', 'tl.rsqrt(_mean_of_products(v, v, C, BLOCKS) + eps)\n'
         '    w =', '1 / (tl.sqrt(_mean_of_products(v, v, C, BLOCKS)) + eps)\n    w ='),
    ),
)
# fmt: on

MUTATIONS = (
    *(*MODELS, *CHECKPOINTS, *ENGINE, *CONFIGS, *DATA, *INFERENCERS, *COMMANDS),
    *(*OPS, *DEPLOY),  # last
)
