"""tools/convert_checkpoint.py: what it writes, tells and refuses."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import golden
import places
import pytest
import torch

from mmhrformer import HRFormer
from mmhrformer.checkpoints import convert, detect_dialect, read_checkpoint, unwrap

TOOL = places.ROOT / 'tools/convert_checkpoint.py'
TINY = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """Run the tool in the folder of the test; returns its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, 'argv', [TOOL.name, *args])
        try:
            runpy.run_path(str(TOOL), run_name='__main__')
            code = 0
        except SystemExit as exit:
            code = exit.code
        shown = capsys.readouterr()
        # A message instead of a number is printed and becomes 1.
        err = code if isinstance(code, str) else shown.err
        return SimpleNamespace(rc=1 if isinstance(code, str) else code, out=shown.out, err=err)

    return run


@pytest.fixture
def official(tmp_path) -> dict:
    content = golden.official_checkpoint('pose', 'keys_pose_tiny.json')
    torch.save(content, tmp_path / 'official.pth')
    return content


@pytest.fixture
def small(tmp_path) -> dict[str, torch.Tensor]:
    """A backbone of ours, which is quickly written."""
    tensors = HRFormer(arch=TINY).state_dict()
    torch.save({'state_dict': tensors}, tmp_path / 'ours.pth')
    return tensors


def same(tensors: dict, expected: dict) -> bool:
    return tensors.keys() == expected.keys() and all(
        torch.equal(tensors[key], expected[key]) for key in expected
    )


def test_official_file_becomes_one_of_ours(tool, official):
    done = tool('official.pth', 'ours.pth')
    assert done.rc == 0
    content = read_checkpoint('ours.pth')
    expected, report = convert(unwrap(official))
    assert list(content) == ['meta', 'state_dict']
    assert content['meta']['source'] == 'official.pth'
    assert content['meta']['source_dialect'] == 'official-pose'
    assert same(content['state_dict'], expected)
    for told in (
        f'official.pth: official-pose, {len(official["state_dict"])} tensors, ',
        f'{len(report.renamed)} renamed, {len(report.joined)} joined',
        f'ours.pth: mmhrformer, {len(expected)} tensors, ',
    ):
        assert told in done.out
    assert re.search(r'tensors, [\d.]+ MB, \d+\.\d s$', done.out.strip())


def test_chain_through_all_dialects_and_formats(tool, official):
    pytest.importorskip('safetensors')
    assert tool('official.pth', 'a.safetensors').rc == 0
    assert tool('a.safetensors', 'b.pth', '--to', 'mmpose').rc == 0
    done = tool('b.pth', 'c.pth', '--to', 'official')
    assert 'does not add the relative position bias' in done.out
    assert detect_dialect(read_checkpoint('a.safetensors')) == 'mmhrformer'
    assert detect_dialect(read_checkpoint('b.pth')['state_dict']) == 'mmpose'
    again = read_checkpoint('c.pth')['state_dict']
    again = {key: v for key, v in again.items() if not key.endswith('relative_position_index')}
    assert same(again, official['state_dict'])


def test_backbone_only(tool, official):
    assert tool('official.pth', 'b.pth', '--to', 'official', '--backbone-only').rc == 0
    tensors = read_checkpoint('b.pth')['model']
    assert detect_dialect(tensors) == 'official-backbone'
    HRFormer('tiny', out_indices=(0,)).load_state_dict(tensors, strict=True)


def test_models_of_the_zoo_and_files_can_be_named_by_the_scheme(tool, small):
    assert tool('mmhrformer://ours.pth', 'again.pth').rc == 0
    assert same(read_checkpoint('again.pth')['state_dict'], small)


def test_file_can_be_converted_in_its_place(tool, small):
    assert tool('ours.pth', 'ours.pth', '--to', 'mmpose', '--overwrite').rc == 0
    tensors = read_checkpoint('ours.pth')['state_dict']
    assert detect_dialect(tensors) == 'mmpose'
    assert same(convert(tensors)[0], small)


def test_what_the_config_of_mmpose_needs_is_told(tool, small):
    torch.save(HRFormer(arch=TINY, with_rpe=False).state_dict(), 'bare.pth')
    assert 'needs with_rpe=False' in tool('bare.pth', 'a.pth', '--to', 'mmpose').out
    assert 'needs with_rpe=False' not in tool('ours.pth', 'b.pth', '--to', 'mmpose').out


def test_averaged_weights_are_told_and_taken_by_key(tool, small):
    averaged = {f'module.{key}': torch.zeros_like(tensor) for key, tensor in small.items()}
    torch.save(dict(state_dict=small, state_dict_ema=averaged), 'both.pth')
    assert "others under 'state_dict_ema'" in tool('both.pth', 'a.pth').out
    assert same(read_checkpoint('a.pth')['state_dict'], small)
    assert tool('both.pth', 'b.pth', '--key', 'state_dict_ema').rc == 0
    assert not any(tensor.any() for tensor in read_checkpoint('b.pth')['state_dict'].values())
    lightning = {f'model.{key}': tensor for key, tensor in small.items()}
    torch.save(dict(state_dict={**lightning, 'loss.weight': torch.ones(3)}), 'lightning.pth')
    assert 'dropped  loss.weight: outside of the model' in tool('lightning.pth', 'c.pth').out
    assert same(read_checkpoint('c.pth')['state_dict'], small)
    assert "key='no'" in tool('both.pth', 'd.pth', '--key', 'no').err


@pytest.mark.parametrize(
    ('args', 'told'),
    [
        (['missing.pth', 'a.pth'], "no checkpoint 'missing.pth'"),
        (['ours.pth', 'ours.pth'], '--overwrite'),
        (['ours.pth', 'no/a.pth'], 'create it first'),
        (['ours.pth', '.'], 'is a folder'),
        (['page.pth', 'a.pth'], 'it is a web page'),
        (['other.pth', 'a.pth'], 'not an HRFormer checkpoint in a known format'),
        (['cls.pth', 'a.pth', '--to', 'mmpose'], '--backbone-only'),
        (['bare.pth', 'a.pth', '--to', 'official'], 'with_rpe=False'),
    ],
    ids=lambda args: ' '.join(args) if isinstance(args, list) else '',
)
def test_misuse_is_one_line_and_leaves_nothing(tool, small, args, told):
    Path('page.pth').write_text('<!DOCTYPE html>\n<html>\n</html>')
    torch.save({'fc.weight': torch.zeros(2, 2)}, 'other.pth')
    whole = {f'backbone.{key}': tensor for key, tensor in small.items()}
    torch.save({**whole, 'neck.0.final_layer.0.bias': torch.zeros(1)}, 'cls.pth')
    torch.save(HRFormer(arch=TINY, with_rpe=False).state_dict(), 'bare.pth')
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    done = tool(*args)
    assert done.rc == 1
    assert done.out == ''
    assert done.err.startswith('convert_checkpoint.py: ')
    assert '\n' not in done.err
    assert told in done.err
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_unknown_dialects_are_answered_with_the_known_ones(tool, small):
    done = tool('ours.pth', 'a.pth', '--to', 'timm')
    assert done.rc == 2
    assert "'official', 'mmpose', 'mmhrformer'" in done.err


def test_help_has_an_example(tool):
    done = tool('--help')
    assert done.rc == 0
    assert 'python -m mmhrformer convert_checkpoint hrt_small.pth hrformer-small.pth' in done.out
