"""One life of a group of worker processes: started together, ended together."""

from __future__ import annotations

import contextlib
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .. import errors
from ..config import EngineConfig
from ..errors import MoePrefillError, UsageError, WorkerError
from ..messages import VERSION, Failure, Hello, Message, Ready, Shutdown, Start
from .channel import Channel
from .page import ProgressPage
from .watch import Patience

WORKER = "moe_prefill.workers.process"  # the module that a worker process runs
_TICK_S = 0.2  # how often processes are looked at; a death is mostly noticed at once, by its closed socket
_GONE_S = 60.0  # for a killed process to leave: its GPU memory is freed first
_MAX_SOCKET_PATH = 100  # the system allows 107 bytes


class WorkerLost(Exception):
    """A worker died, hangs, or failed. ``error`` is what the user is told if the group cannot be brought back;
    ``reported``: the worker itself found it, so the same start would fail in the same way.
    """

    def __init__(self, error: MoePrefillError, *, reported: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.reported = error, reported


class Closed(Exception):
    """The engine is being closed."""


class WorkerGroup:
    """Processes of ranks 0 to ``size - 1`` and the connections to them. Used by one thread, which must live as long as
    the processes: they are told to die with it.

    The sockets lie in a private directory, which is gone as soon as all workers are connected and ready.
    When ``wake`` becomes readable, ``poll`` returns, or raises Closed where ``closing`` says so.
    """

    def __init__(
        self, config: EngineConfig, size: int, patience: Patience, wake: socket.socket, closing: Callable[[], bool]
    ) -> None:
        self.size, self._patience = size, patience
        self.page = ProgressPage.create(size)
        self._config = config
        self._directory = Path(tempfile.mkdtemp(prefix="moe-prefill-"))  # mode 0700
        self._selector = selectors.DefaultSelector()
        self._wake, self._closing = wake, closing
        self._selector.register(wake, selectors.EVENT_READ)
        self._channels: list[Channel] = []
        self._by_rank: dict[int, Channel] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._arrived: list[tuple[int, Message]] = []

    def start(self, generation: int = 0) -> list[Ready]:
        """Start the processes and wait until every engine is built. Raises WorkerLost and Closed."""
        with _listen(self._directory / "socket") as listener, socket.create_server(("127.0.0.1", 0)) as store:
            self._selector.register(listener, selectors.EVENT_READ)
            for rank in range(self.size):
                self._processes.append(self._spawn(rank, store))
            port = store.getsockname()[1]
            start = Start(config=self._config, size=self.size, store_port=port, generation=generation)
            ready = self._wait_until_ready(listener, start)
            self._selector.unregister(listener)
        shutil.rmtree(self._directory)
        return ready

    def send(self, rank: int, message: Message) -> None:
        """Send without waiting. Raises WorkerLost."""
        channel = self._by_rank[rank]
        try:
            channel.send(message)
        except OSError:
            raise self._lost(rank) from None
        self._selector.modify(channel.socket, _events(channel), channel)

    def poll(self, timeout_s: float | None = None) -> list[tuple[int, Message]]:
        """Messages with the ranks that sent them, after at most ``timeout_s``, or a tick. Raises WorkerLost, Closed."""
        for key, _ in self._selector.select(_TICK_S if timeout_s is None else min(timeout_s, _TICK_S)):
            if isinstance(key.data, Channel):
                self._attend(key.data)
            elif key.fileobj is self._wake:
                self._wake.recv(4096)
                if self._closing():
                    raise Closed
            else:
                self._accept(key.fileobj)
        self._check()
        arrived, self._arrived = self._arrived, []
        return arrived

    def finish(self) -> None:
        """An orderly end: every worker frees what it holds and leaves."""
        for channel in self._by_rank.values():
            with contextlib.suppress(OSError):
                channel.send(Shutdown())
        deadline = time.monotonic() + self._patience.stop_s
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return  # kill() ends it

    def kill(self) -> None:
        """End every process, wait until they are gone, and leave nothing behind. May be called at any time."""
        for process in self._processes:
            process.send_signal(signal.SIGKILL)
        for rank, process in enumerate(self._processes):
            try:
                process.wait(_GONE_S)
            except subprocess.TimeoutExpired:
                raise WorkerError(
                    f"worker {rank} (process {process.pid}) does not end {_GONE_S:.0f} s after SIGKILL; "
                    "its device or file system is stuck"
                ) from None
        for channel in self._channels:
            channel.socket.close()
        self._selector.close()
        self.page.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def hangs(self, ranks: Sequence[int], limit_s: float) -> WorkerLost:
        """What to raise for ranks that the watch has given up. Ranks wait for one another, so the one that has done
        least holds the others up.
        """
        layers, rank = min((layers, rank) for rank, layers in enumerate(self.page.read()) if rank in ranks)
        pid = self._processes[rank].pid
        return WorkerLost(
            WorkerError(f"worker {rank} (process {pid}) hangs: no layer in {limit_s:.1f} s, {layers} before that")
        )

    def _spawn(self, rank: int, store: socket.socket) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", WORKER, str(self._directory / "socket"), str(rank)]
        command += [str(self.page.fd), str(store.fileno() if rank == 0 else -1)]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.__stderr__ if sys.__stderr__ else subprocess.DEVNULL,  # standard output belongs to the rows
            pass_fds=[self.page.fd, *([store.fileno()] if rank == 0 else [])],
            process_group=0,  # Ctrl-C is the controller's to handle
        )

    def _wait_until_ready(self, listener: socket.socket, start: Start) -> list[Ready]:
        ready: dict[int, Ready] = {}
        deadline = time.monotonic() + self._patience.start_s
        while len(ready) < self.size:
            for rank, message in self.poll():
                if isinstance(message, Hello):
                    self.send(rank, start)
                elif isinstance(message, Ready):
                    ready[rank] = message
            if time.monotonic() > deadline:
                late = sorted(set(range(self.size)) - set(ready))
                raise WorkerLost(WorkerError(f"workers {late} are not ready after {self._patience.start_s:g} s"))
        return [ready[rank] for rank in range(self.size)]

    def _accept(self, listener: object) -> None:
        assert isinstance(listener, socket.socket)
        channel = Channel(listener.accept()[0])
        self._channels.append(channel)
        self._selector.register(channel.socket, selectors.EVENT_READ, channel)

    def _attend(self, channel: Channel) -> None:
        """Send what is left and read what has come."""
        with contextlib.suppress(OSError):  # that the peer has gone is found by reading
            channel.flush()
        for message in channel.receive():
            if channel.rank < 0:
                self._introduce(channel, message)
            self._arrived.append((channel.rank, message))
        if not channel.closed:
            self._selector.modify(channel.socket, _events(channel), channel)
        elif channel.socket in self._selector.get_map():
            self._selector.unregister(channel.socket)

    def _check(self) -> None:
        """Raise WorkerLost if any worker failed or has gone. One that was lost makes its peers fail: look for the cause
        first, then for what they say of one another.
        """
        gone = [rank for rank in range(self.size) if self._is_gone(rank)]
        failures = {rank: message for rank, message in self._arrived if isinstance(message, Failure)}
        causes = [rank for rank, message in failures.items() if message.code != WorkerError.__name__]
        silent = [rank for rank in gone if rank not in failures]
        for rank in causes or silent or failures:
            raise _failure(rank, failures[rank]) if rank in failures else self._lost(rank)

    def _is_gone(self, rank: int) -> bool:
        """Whether a worker has ended or closed its connection; its last words have been read then."""
        channel, ended = self._by_rank.get(rank), self._processes[rank].poll() is not None
        if ended and channel is not None:
            self._attend(channel)
        return ended or (channel is not None and channel.closed)

    def _introduce(self, channel: Channel, message: Message) -> None:
        if not isinstance(message, Hello) or message.version != VERSION:
            said = f"a worker says {message!r:.200} where a hello of version {VERSION} belongs"
            raise WorkerLost(WorkerError(f"{said}; is the installation mixed?"))
        assert self._processes[message.rank].pid == message.pid, message
        channel.rank = message.rank
        self._by_rank[message.rank] = channel

    def _lost(self, rank: int) -> WorkerLost:
        process = self._processes[rank]
        try:
            code = process.wait(1.0)
        except subprocess.TimeoutExpired:
            return WorkerLost(WorkerError(f"worker {rank} (process {process.pid}) has closed its connection"))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return WorkerLost(WorkerError(f"worker {rank} (process {process.pid}) {how}"))


def _listen(path: Path) -> socket.socket:
    if len(str(path)) > _MAX_SOCKET_PATH:
        raise UsageError(f"{path}: is too long a path for a socket; set TMPDIR to a shorter directory")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    return listener


def _events(channel: Channel) -> int:
    return selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.has_unsent else 0)


def _failure(rank: int, message: Failure) -> WorkerLost:
    """A worker's last words: an error of the user's comes out as the same class here."""
    kind = _USER_ERRORS.get(message.code)
    if kind is not None:
        return WorkerLost(kind(message.message), reported=kind is not WorkerError)
    return WorkerLost(WorkerError(f"worker {rank} failed: {message.code}: {message.message}"), reported=True)


def _user_errors() -> Iterator[tuple[str, type[MoePrefillError]]]:
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, MoePrefillError) and kind is not errors.RowError:
            yield name, kind


_USER_ERRORS = dict(_user_errors())
