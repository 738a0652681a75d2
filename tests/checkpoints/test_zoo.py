"""The zoo: names, sources, and files that come from a server on this machine."""

from __future__ import annotations

import hashlib
import io

import golden
import pytest
import torch
import yaml
from http_server import Answer, Server
from mmengine.runner import load_checkpoint as mmengine_load

import mmhrformer
from mmhrformer.checkpoints import (
    DownloadError,
    cache_folder,
    fetch,
    find_model,
    find_source,
    list_models,
    load_checkpoint,
    read_zoo,
    zoo,
)
from mmhrformer.checkpoints.loading import load_from_scheme, read

TINY = 'hrformer-tiny_8xb128_in1k'


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MMHRFORMER_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr('mmhrformer.checkpoints.download.TIMEOUT', 5)
    monkeypatch.setattr('mmhrformer.checkpoints.download.sleep', lambda seconds: None)
    yield
    read_zoo.cache_clear()


def saved(content: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture(scope='module')
def checkpoint() -> bytes:
    """An official classification checkpoint with numbers made from names."""
    return saved(golden.official_checkpoint('cls', 'keys_cls_tiny.json'))


def small_zoo(folder, monkeypatch, *sources: dict) -> None:
    """Replace the zoo by one model with these sources."""
    entry = dict(
        Name=TINY,
        Config=f'configs/hrformer_cls/{TINY}.py',
        Metadata=dict(Parameters=1),
        Sources=list(sources),
    )
    metafile = folder / 'configs/hrformer_cls/metafile.yml'
    metafile.parent.mkdir(parents=True)
    metafile.write_text(yaml.safe_dump(dict(Models=[entry])))
    monkeypatch.setattr(zoo, 'config_root', lambda: folder / 'configs')
    read_zoo.cache_clear()


def source(link: str, **changes) -> dict:
    return {'From': 'official', 'Link': link, 'Kind': 'file', 'Holds': 'whole model', **changes}


def hashed(content: bytes) -> str:
    return f'hrt_tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth'


def test_every_model_has_its_config():
    assert len(read_zoo()) == 58
    for name, model in read_zoo().items():
        assert model.config.is_file()
        assert model.config.stem == name
        assert model.metadata['Parameters'] > 1e6
        for one in model.sources:
            assert one.link.startswith('https://')
            assert one.path(name).suffix == '.pth'


def test_models_are_listed_by_pattern():
    assert list_models('hrformer-tiny_*') == [TINY]
    assert mmhrformer.list_models() == sorted(read_zoo())
    assert list_models('resnet*') == []


def test_unknown_names_are_answered_with_similar_ones():
    with pytest.raises(ValueError, match=f"no model 'hrformer-tny'.*did you mean.*{TINY}"):
        find_model('hrformer-tny')
    with pytest.raises(FileNotFoundError, match=r'neither a file .* nor a model .*Did you mean'):
        read('mmhrformer://hrformer-tiny_8xb128_in2k')


def test_pages_for_sharing_need_two_steps():
    (one,) = read_zoo()[TINY].sources
    file = cache_folder() / f'{TINY}-official.pth'
    with pytest.raises(FileNotFoundError) as info:
        fetch(TINY)
    assert f'open {one.link} in a browser' in str(info.value)
    assert f'put it here: {file}' in str(info.value)
    file.parent.mkdir(parents=True)
    file.write_bytes(b'anything')
    assert fetch(TINY) == file


def test_sources_are_told_apart_by_origin_and_content(tmp_path, monkeypatch):
    page = source('https://example.com/page', Kind='share page')
    part = source('https://example.com/a.pth', From='mmpose', Holds='backbone')
    small_zoo(tmp_path, monkeypatch, part, page)
    assert find_source(TINY)[1].origin == 'mmpose'
    assert find_source(TINY, whole=True)[1].origin == 'official'
    assert find_source(f'{TINY}@official')[1].link == page['Link']
    with pytest.raises(ValueError, match=f'no.* whole model for {TINY}@mmpose; there'):
        find_source(f'{TINY}@mmpose', whole=True)
    with pytest.raises(
        ValueError, match=f'no published checkpoint for {TINY}@google; there is {TINY}@mmpose'
    ):
        find_source(f'{TINY}@google')
    # What is here already comes first.
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache' / f'{TINY}-official.pth').touch()
    assert find_source(TINY)[1].origin == 'official'


def test_models_that_nobody_published():
    with pytest.raises(ValueError, match=r'no published checkpoint .* train it'):
        fetch('td-hm_hrformer-tiny_8xb32-210e_coco-256x192')


def test_by_name_through_all_doors(tmp_path, monkeypatch, checkpoint):
    """Downloaded once, after a try that was cut off; checked; translated; equal to the file."""
    path = f'/{hashed(checkpoint)}'
    with Server({path: checkpoint}, [Answer(cut=100_000)]) as server:
        small_zoo(tmp_path, monkeypatch, source(server.url(path[1:])))
        model = mmhrformer.get_model(TINY, pretrained=True)
        requests = len(server.requests)
        assert requests == 2
        again = mmhrformer.get_model(TINY, pretrained=f'mmhrformer://{TINY}')
        mmengine_load(again, f'mmhrformer://{TINY}@official')
        report = load_checkpoint(again, TINY, strict=True)
        assert len(server.requests) == requests
    assert (report.missing, report.unused) == ([], [])
    assert not model.training
    expected = golden.load('cls_tiny.npz')
    with torch.no_grad():
        logits = model(golden.image((2, 3, 224, 224)))
    name = next(key for key in ('logits', 'out') if f'{key}.shape' in expected)
    assert golden.difference(expected, name, logits) < 1e-4
    state = model.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize(
    ('answer', 'message'),
    [
        (Answer(status=404), r'404 Not Found.*the link is dead'),
        (Answer(body=b'<!DOCTYPE html><html>'), 'sent a web page, not a checkpoint'),
        (Answer(body=b'PK something else'), r'received 17 bytes, whose SHA-256 is \w+, expected'),
        (Answer(cut=1000), 'received 1000 bytes.* the connection was cut'),
    ],
    ids=['404', 'page', 'wrong hash', 'cut off'],
)
def test_what_the_network_spoils_is_never_used(answer, message, tmp_path, monkeypatch, checkpoint):
    path = f'/{hashed(checkpoint)}'
    with Server({path: checkpoint}, finally_=answer) as server:
        small_zoo(tmp_path, monkeypatch, source(server.url(path[1:])))
        with pytest.raises(DownloadError, match=f'(?s){message}'):
            mmhrformer.get_model(TINY, pretrained=True)
    assert not (tmp_path / 'cache' / path[1:]).exists()


def test_spoiled_files_of_other_programs_are_refused(tmp_path, checkpoint):
    """mim saves whatever comes under the name that promises a hash."""
    for content in (checkpoint[:-5], b'<html>', b''):
        file = tmp_path / hashed(checkpoint)
        file.write_bytes(content)
        for door in (read, load_from_scheme, lambda name: load_checkpoint(None, name)):
            with pytest.raises(DownloadError, match='is not what its name says'):
                door(f'mmhrformer://{file}')
    file.write_bytes(checkpoint)
    assert read(str(file))[0] == file


def test_whole_hashes_of_the_zoo_are_checked(tmp_path, monkeypatch, checkpoint):
    """The metafiles may say them for files and for pages, whatever is in the file's name."""
    good, bad = hashlib.sha256(checkpoint).hexdigest(), '0' * 64
    for kind, sha256 in (('file', good), ('file', bad), ('share page', good), ('share page', bad)):
        link = f'https://127.0.0.1:9/{hashed(checkpoint)}'
        folder = tmp_path / f'{kind} {sha256}'
        small_zoo(folder, monkeypatch, source(link, Kind=kind, SHA256=sha256))
        (one,) = read_zoo()[TINY].sources
        one.path(TINY).parent.mkdir(exist_ok=True)
        one.path(TINY).write_bytes(checkpoint)
        for door in (fetch, read, load_from_scheme):
            if sha256 == good:
                assert door(TINY)
                continue
            with pytest.raises(DownloadError, match=f'SHA-256 is {good}, expected {bad}'):
                door(TINY)
    with Server({'/a.pth': checkpoint}) as server:
        small_zoo(tmp_path / 'download', monkeypatch, source(server.url('a.pth'), SHA256=bad))
        with pytest.raises(DownloadError, match=f'SHA-256 is {good}, expected {bad}'):
            fetch(TINY)
