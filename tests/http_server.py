"""A server on this machine that misbehaves as told."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """An answer to a request, by default a correct one.

    Attributes:
        status (int): Status of an answer without a file; 0 is 200 or 404, as is right.
        headers (Mapping[str, str]): Added to the usual ones, or in their place.
        body (bytes, optional): Sent instead of the file.
        cut (int, optional): End the connection after so many bytes of the body.
        reset (bool): End it by a reset, as a crash does.
        hold (bool): Keep it open after what was sent, and send nothing more.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    cut: int | None = None
    reset: bool = False
    hold: bool = False


class Server:
    """Serves a file under every path, or several files under theirs.

    Args:
        files (bytes | Mapping[str, bytes]): The content, or contents by path such as ``'/a.pth'``.
        answers (Iterable[Answer]): How to answer the first requests, one after the other.
        finally_ (Answer): How to answer all after these.

    Attributes:
        requests (list): Headers of the requests, with ``'path'``.

    Examples:
        >>> from urllib.request import urlopen
        >>> with Server(b'weights') as server:
        ...     urlopen(server.url('any.pth')).read()
        b'weights'
    """

    def __init__(
        self,
        files: bytes | Mapping[str, bytes],
        answers: Iterable[Answer] = (),
        finally_: Answer = Answer(),
    ) -> None:
        self.files = files
        self.answers = list(answers)
        self.finally_ = finally_
        self.requests: list[dict[str, str]] = []
        self.closed = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Server:
        handler = type('Handler', (_Handler,), dict(owner=self))
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def url(self, name: str = 'model.pth') -> str:
        return f'http://127.0.0.1:{self._server.server_address[1]}/{name}'

    def content(self, path: str) -> bytes | None:
        return self.files if isinstance(self.files, bytes) else self.files.get(path)

    def next_answer(self, request: dict[str, str]) -> Answer:
        with self._lock:
            self.requests.append(request)
            return self.answers.pop(0) if self.answers else self.finally_


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    owner: Server

    def do_GET(self) -> None:
        answer = self.owner.next_answer({'path': self.path, **self.headers})
        status, headers, body = self.compose(answer)
        usual = {'Connection': 'close', 'Content-Length': str(len(body))}
        self.send_response(status)
        for name, value in {**usual, **headers, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.send(answer, body)

    def compose(self, answer: Answer) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and the whole body of an answer."""
        content = self.owner.content(self.path)
        if answer.status or content is None:
            return answer.status or 404, {}, answer.body or b''
        headers = {'Content-Type': 'application/octet-stream'}
        return 200, headers, content if answer.body is None else answer.body

    def send(self, answer: Answer, body: bytes) -> None:
        try:
            self.wfile.write(body[: answer.cut])
        except ConnectionError:  # who asked has read enough
            return
        if answer.hold:
            self.owner.closed.wait()
        if answer.reset:
            linger = struct.pack('ii', 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())  # now: the streams of the handler still hold it

    def log_message(self, *args) -> None:
        pass
