"""The engines behind the router: their addresses, what is known of each, and who may be chosen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from yarl import URL

from vllm_saga.router.fleet import EngineReport, Placer
from vllm_saga.router.health import Health

RANK_HEADER = "X-data-parallel-rank"


class AddressError(ValueError):
    """No backend can be there; the message says why."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine is: a server, and the rank of one of its engines if it has several."""

    url: str
    rank: int | None
    name: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `http://host:port[/path][#rank]`.

        Raises:
            AddressError: anything else.
        """
        try:
            url = URL(text.strip())
            # Reads host and port, which yarl does only when they are wanted.
            origin = str(url.origin()) if url.host else ""
        except ValueError as error:
            raise AddressError(f"{text!r} is no URL: {error}") from None
        if url.scheme not in ("http", "https") or not origin:
            raise AddressError(f"{text!r} is no backend: http://host:port or http://host:port#rank")
        if url.query_string or url.user is not None:
            raise AddressError(f"{text!r}: a backend has neither a query nor a user")
        if url.fragment and not re.fullmatch(r"[0-9]{1,6}", url.fragment):
            raise AddressError(f"{text!r}: what follows # is a data-parallel rank: 0, 1, ...")
        rank = int(url.fragment) if url.fragment else None
        path = url.raw_path.rstrip("/")
        name = f"{url.host}:{url.port}{path}" + ("" if rank is None else f"-dp{rank}")
        return cls(origin + path, rank, name)


def parse_list(text: str) -> list[Address]:
    """Addresses between commas or white space; lines that begin with # are comments.

    Raises:
        AddressError: one of them is none.
    """
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [Address.parse(part) for line in lines for part in re.split(r"[,\s]+", line) if part]


@dataclass(slots=True, eq=False)
class Backend:
    """An engine. `speaks_saga`: whether it answers GET /v1/saga/state; None until it was asked."""

    address: Address
    health: Health
    draining: bool = False
    accepting: bool = False
    removed: bool = False
    in_flight: int = 0
    report: EngineReport | None = None
    speaks_saga: bool | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.address.name


class Backends:
    """The backends of now; the placer is kept in step.

    started, stopped: who watches them is told here of those that come and go.
    """

    def __init__(self, placer: Placer, make_health: Callable[[], Health]) -> None:
        self._placer = placer
        self._make_health = make_health
        self.started: Callable[[Backend], None] = lambda backend: None
        self.stopped: Callable[[Backend], None] = lambda backend: None
        self._by_name: dict[str, Backend] = {}

    def __iter__(self) -> Iterator[Backend]:
        return iter(tuple(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Backend | None:
        return self._by_name.get(name)

    def find(self, name_or_url: str) -> Backend | None:
        """The backend of this name, or at this address."""
        found = self._by_name.get(name_or_url)
        if found is None:
            try:
                found = self._by_name.get(Address.parse(name_or_url).name)
            except AddressError:
                return None
        return found

    def add(self, address: Address) -> Backend:
        """It gets calls once a probe has found it; one that is here already is kept."""
        if address.name in self._by_name:
            return self._by_name[address.name]
        backend = Backend(address, self._make_health())
        if address.rank is not None:
            backend.headers[RANK_HEADER] = str(address.rank)
        self._by_name[address.name] = backend
        self._placer.add(address.name)
        self._placer.set_accepting(address.name, False)
        self.started(backend)
        return backend

    def remove(self, backend: Backend) -> None:
        """It gets no more calls; those it has go on."""
        if self._by_name.pop(backend.name, None) is not None:
            backend.removed = True
            backend.accepting = False
            self.stopped(backend)
            self._placer.remove(backend.name)

    def drain(self, backend: Backend, draining: bool) -> None:
        backend.draining = draining
        self._placer.set_draining(backend.name, draining)

    def refresh(self, backend: Backend, now: float) -> None:
        """Tell the placer if calls may be sent there, when that has changed."""
        accepting = backend.health.accepting(now)
        if not backend.removed and accepting != backend.accepting:
            backend.accepting = accepting
            self._placer.set_accepting(backend.name, accepting)

    def any_accepting(self) -> bool:
        return any(backend.accepting for backend in self._by_name.values())


class BackendsFile:
    """A file of addresses that is read again when it changes.

    What it no longer lists is removed if it was this file that had added it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._added: set[str] = set()

    def update(self, backends: Backends) -> bool:
        """Whether the file had changed.

        Raises:
            AddressError: it lists something else, or is no text; the backends are as they were.
            OSError: it cannot be read.
        """
        stat = self.path.stat()
        seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise AddressError(f"{self.path}: no text: {error}") from None
        listed = {a.name: a for a in parse_list(text)}
        for name in self._added - listed.keys():
            if gone := backends.get(name):
                backends.remove(gone)
            self._added.remove(name)
        for name, address in listed.items():
            if backends.get(name) is None:
                backends.add(address)
                self._added.add(name)
        return True
