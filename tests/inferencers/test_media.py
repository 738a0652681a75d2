"""Inputs: images, folders, videos, URLs, and what is wrong with them."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import cv2
import pytest
from http_server import Answer, Server
from inference_samples import make_image
from PIL import Image

from mmhrformer.inferencers import media
from mmhrformer.inferencers.image_loading import Loader


class TestWhatIsAVideo:
    @pytest.fixture(scope='class')
    def clips(self, tmp_path_factory) -> Path:
        """Five frames in containers that no list of suffixes has, and under other names."""
        folder = tmp_path_factory.mktemp('clips')
        for name, code in (
            ('a.flv', 'FLV1'),
            ('a.3gp', 'mp4v'),
            ('a.ts', 'mp4v'),
            ('a.mp4', 'mp4v'),
        ):
            writer = cv2.VideoWriter(
                str(folder / name), cv2.VideoWriter_fourcc(*code), 10, (64, 48)
            )
            for _ in range(5):
                writer.write(make_image(48, 64))
            writer.release()
        (folder / 'no_suffix').write_bytes((folder / 'a.flv').read_bytes())
        (folder / 'wrong.jpg').write_bytes((folder / 'a.mp4').read_bytes())
        frames = [Image.fromarray(make_image(48, 64)) for _ in range(5)]
        frames[0].save(folder / 'a.gif', save_all=True, append_images=frames[1:], duration=100)
        return folder

    def test_the_reader_is_asked(self, clips):
        for path in sorted(clips.iterdir()):
            if not path.stat().st_size:
                continue  # an OpenCV that cannot write it
            film = media.open_media(path)
            assert isinstance(film, media.Video), path
            assert [picture.source.shape for picture in film] == [(48, 64, 3)] * 5, path

    def test_from_the_web(self, clips):
        names = [name for name in ('a.gif', 'a.3gp', 'no_suffix') if (clips / name).stat().st_size]
        with Server({f'/{name}': (clips / name).read_bytes() for name in names}) as server:
            for name in names:
                assert len(list(media.open_media(server.url(name)))) == 5, name

    def test_in_a_folder_they_are_named(self, clips, tmp_path):
        (tmp_path / 'a.flv').write_bytes((clips / 'a.flv').read_bytes())
        cv2.imwrite(str(tmp_path / 'b.jp2'), make_image())  # a suffix that no list has
        (tmp_path / 'notes.txt').write_text('no image' * 99)
        with pytest.warns(UserWarning, match=r'pass each video separately: a\.flv'):
            (picture,) = media.open_media(tmp_path)
        assert picture.source == tmp_path / 'b.jp2'

    def test_what_is_not_read_is_named(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'text.flv').write_text('this is text')
        (tmp_path / 'notes.txt').write_text('this is text\n' * 50)  # FFmpeg would film it
        (tmp_path / 'image.mp4').write_bytes(cv2.imencode('.png', make_image())[1].tobytes())
        for name, message in (
            ('text.flv', r"'text\.flv': cannot read from the video"),
            ('notes.txt', r"'notes\.txt': it is not an image"),
            ('webcam', "'webcam': cannot read from the camera. Check its number"),
            ('webcam:99', "'webcam:99': cannot read from the camera"),
            ('rtsp://127.0.0.1:9/street', r"'rtsp://127\.0\.0\.1:9/street': cannot read from"),
        ):
            with pytest.raises(ValueError, match=message):
                media.open_media(name)
        (picture,) = media.open_media('image.mp4')
        assert Loader().load(picture).shape == (48, 40, 3)

    def test_cameras_and_streams(self, video, monkeypatch):
        """OpenCV reads both: a number is a camera, and an address stays as it is."""
        opened, capture = [], cv2.VideoCapture

        def record(source):
            opened.append(source)
            return capture(str(video))

        monkeypatch.setattr(cv2, 'VideoCapture', record)
        for name, source in (('webcam', 0), ('webcam:2', 2), ('rtsp://host/a', 'rtsp://host/a')):
            opened.clear()
            film = media.open_media(name)
            assert len(list(film)) == 5
            assert opened == [source] * 2
            assert film.name == name

    def test_a_video_that_ends_too_early(self, video):
        film = media.Video(video)
        film._length = 50  # as the header of a file that was cut off says
        with pytest.warns(UserWarning, match=r'walk\.avi: only 5 of 50 frames could be read'):
            assert len(list(film)) == 5


def test_address_without_suffix_and_other_answers(folder):
    content = (folder / 'a.png').read_bytes()
    with Server(content, finally_=Answer(headers={'Content-Type': 'image/png'})) as server:
        (picture,) = media.open_media(server.url('image?id=7'))
        assert (picture.stem, Loader().load(picture).shape) == ('image', (48, 40, 3))
    page = Answer(headers={'Content-Type': 'text/html'})
    with Server(content, finally_=page) as server, pytest.raises(ValueError, match='is a web page'):
        media.open_media(server.url('a.png'))
    with Server({}) as server, pytest.raises(ValueError, match=r'downloaded \(HTTP Error 404'):
        media.open_media(server.url('a.png'))
    with Server(b'GIF89a') as server, pytest.raises(ValueError, match=r'x\.gif.*Pass an image'):
        media.open_media(server.url('x.gif'))
    with pytest.raises(ValueError, match='cannot be downloaded'):
        media.open_media('http://127.0.0.1:9/a.png')


def test_downloads_are_deleted_with_what_was_made_of_them(folder, video, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    files = {'/a.png': (folder / 'a.png').read_bytes(), '/v.avi': video.read_bytes(), '/b': b''}
    with Server(files) as server:
        film, (picture,) = [media.open_media(server.url(name)) for name in ('v.avi', 'a.png')]
        with pytest.raises(ValueError, match='it is empty'):
            media.open_media(server.url('b'))
        listed = media.open_media([server.url('a.png')] * 2)
        assert len(list(tmp_path.iterdir())) == 2
        assert len(list(film)) == 5
        for one in (picture, *listed):
            assert Loader().load(one).shape == (48, 40, 3)
    del film, picture, one
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_names_of_files():
    assert media.stem_of('https://a.org/people%20at%20home.jpg?size=big') == 'people at home'
    assert media.stem_of(Path('folder/a.b.png')) == 'a.b'
    # File names may have 255 bytes, which the names of outputs exceed.
    assert media.stem_of('x' * 251 + '.png') == 'x' * 200
    assert media.stem_of('圖' * 83 + '.png') == '圖' * 66
