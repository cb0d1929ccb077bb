"""The file in which an engine keeps what it has learned of the agents it serves."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from vllm.logger import init_logger

from vllm_saga.policy.graph import AgentClasses
from vllm_saga.policy.memory import Document, GraphError, decode, encode, restore, snapshot

logger = init_logger("vllm.saga")

_IDLE_S = 1.0


def of_rank(path: Path, rank: int) -> Path:
    """The file of one engine of a data-parallel server: `graph.json`, `graph.1.json`, …"""
    return path.with_name(f"{path.stem}.{rank}{path.suffix}") if rank else path


class GraphFile:
    """Loads the agent classes at start, and saves them every `interval_s` seconds and at the end.

    A save never blocks: the caller's thread copies the numbers (milliseconds), another encodes and
    writes them, to a file beside that then takes the old one's place. Nothing here raises: a file
    that cannot be read or written is logged, and the engine goes on without.
    """

    def __init__(self, path: Path | str, interval_s: float) -> None:
        self._path = Path(path)
        self._interval_s = interval_s
        self._next_save: float | None = None
        self._writer: threading.Thread | None = None
        self._failing = False

    def load(self, classes: AgentClasses) -> bool:
        """Take over what the file holds; a file that makes no sense is renamed to `.bad`."""
        try:
            document = decode(self._path.read_bytes())
            # Elsewhere first: what cannot be restored must not leave half of itself behind.
            restore(AgentClasses(), document)
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("saga: %s cannot be read, starting without: %s", self._path, error)
            return False
        except Exception as error:
            if not isinstance(error, GraphError):
                logger.exception("saga: a graph that was read cannot be used. Please report this.")
            aside = self._path.with_name(self._path.name + ".bad")
            logger.warning("saga: %s: %s; starting without, see %s", self._path, error, aside)
            with contextlib.suppress(OSError, ValueError):
                os.replace(self._path, aside)
            return False
        restore(classes, document)
        logger.info("saga: %d agent classes from %s", len(document.agents), self._path)
        return True

    def maybe_save(self, classes: AgentClasses, now: float, idle: bool = False) -> None:
        """Save in the background if it is time; `now` in seconds of a monotonic clock.

        idle: the engine has nothing to do. It is then time a second after the last save: vLLM does
        not let an engine finish when its server is stopped (`--shutdown-timeout` is 0 by default).
        """
        if self._next_save is None:
            self._next_save = now + self._interval_s
        due = self._next_save - (max(self._interval_s - _IDLE_S, 0.0) if idle else 0.0)
        if now < due or (self._writer is not None and self._writer.is_alive()):
            return
        self._next_save = now + self._interval_s
        document = snapshot(classes)
        self._writer = threading.Thread(
            target=self._write, args=(document,), name="saga-graph", daemon=True
        )
        self._writer.start()

    def save_now(self, classes: AgentClasses) -> None:
        """Save before returning: for the end of the engine."""
        if self._writer is not None:
            self._writer.join()
        self._write(snapshot(classes))

    def _write(self, document: Document) -> None:
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(encode(document))
            os.replace(beside, self._path)
        except (OSError, ValueError) as error:
            if not self._failing:
                logger.warning("saga: %s cannot be written: %s", self._path, error)
            self._failing = True
            with contextlib.suppress(OSError):
                beside.unlink()
        else:
            self._failing = False
