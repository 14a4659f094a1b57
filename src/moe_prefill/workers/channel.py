"""Messages over a socket that never blocks: a worker that stopped reading must not stop its controller."""

from __future__ import annotations

import socket
from collections import deque

from ..messages import Decoder, Message, encode

_CHUNK = 1 << 20


class Channel:
    """One worker's connection. ``rank`` is -1 until it has said hello."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.rank = -1
        self.closed = False
        self._decoder = Decoder()
        self._unsent: deque[memoryview] = deque()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def send(self, message: Message) -> None:
        """Send what the socket takes now; ``flush`` sends the rest when it is ready. OSError: the peer is gone."""
        self._unsent.extend(memoryview(part) for part in encode(message) if len(part))
        self.flush()

    def flush(self) -> None:
        while self._unsent:
            try:
                sent = self.socket.send(self._unsent[0])
            except BlockingIOError:
                return
            if sent == len(self._unsent[0]):
                self._unsent.popleft()
            else:
                self._unsent[0] = self._unsent[0][sent:]

    def receive(self) -> list[Message]:
        """The messages that have arrived by now; at the end of the stream ``closed`` is set."""
        messages: list[Message] = []
        while not self.closed:
            try:
                data = self.socket.recv(_CHUNK)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            self.closed = not data
            messages += self._decoder.feed(data)
        return messages
