"""The group of all ranks: rendezvous, agreement on the configuration, and heartbeats.

Ranks exchange short values through a key-value store, which torchrun hosts, or else rank 0. A rank
that dies leaves the others waiting in a collective, some of them for ever: every rank therefore
sends heartbeats, checks the others', and ends with a line that says which one is gone.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from steerlora.distributed.listening import listening
from steerlora.distributed.ranks import Ranks
from steerlora.errors import RankGone, UserError
from steerlora.text import for_terminal

HEARTBEAT_INTERVAL = 1.0
"""Seconds between two heartbeats."""
HEARTBEAT_TIMEOUT = 30.0
"""Seconds without one after which a rank counts as gone."""
DIAGNOSIS_TIMEOUT = 12.0
"""Seconds to find the rank that is gone, once a collective has failed."""
RENDEZVOUS_TIMEOUT = 600.0
"""Seconds that the first rank waits for the last to join."""
PARTING_WORDS = 300
"""Characters of a rank's last line that the others show."""
SHUTDOWN_TIMEOUT = 3.0
"""Seconds that the host of the store stays for others to read from it."""


class Group:
    """All ranks of a process's lifetime: process group, key-value store, heartbeats.

    Args:
        ranks: this process's.

    Raises:
        UserError: the store cannot be reached, or a rank does not join.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self._run, self._sequence = ranks, 0, 0
        self._monitors, self._failing, self._store_lost = False, False, False
        self._heartbeats: dict[int, tuple[int, float]] = {}  # rank: its last beat, and when
        self._gone: dict[int, str] = {}  # rank: what became of it
        self._torchrun_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._hosts = ranks.rank == 0 and not self._torchrun_hosts
        self._store = self._connect(hosts=self._hosts)
        self._rendezvous()
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("collectives", self._store),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timedelta(hours=2),
        )
        # A connection of its own: another thread may be waiting on the first.
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._send_heartbeats, args=(self._connect(),), daemon=True
        )
        self._thread.start()
        # An interpreter that ends while a thread is inside the store's C++ is aborted.
        atexit.register(self._stop_heartbeats)

    def _connect(self, *, hosts: bool = False):
        address = f"{self.ranks.address}:{self.ranks.port}"
        try:
            store = dist.TCPStore(
                self.ranks.address,
                self.ranks.port,
                is_master=hosts,
                timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT),
                wait_for_workers=False,
                master_listen_fd=listening(self.ranks).detach() if hosts else None,
            )
        except (dist.DistError, OSError) as error:
            raise UserError(
                f"rank {self.ranks.rank} cannot {'host' if hosts else 'reach'} the rendezvous "
                f"store at {address} ({str(error).splitlines()[0]}); MASTER_ADDR and MASTER_PORT "
                "set its address"
            ) from error
        # torchrun keeps its store over restarts: what an earlier attempt wrote must not count.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"steerlora/{attempt}", store)

    def _rendezvous(self) -> None:
        """Wait until every rank has joined: a collective would wait for hours, and name none."""
        keys = [f"joined/{rank}" for rank in range(self.ranks.world)]
        self._store.set(keys[self.ranks.rank], "")
        deadline = time.monotonic() + RENDEZVOUS_TIMEOUT
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                late = [str(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
                raise UserError(
                    f"of {self.ranks.world} ranks, rank {', '.join(late)} has not joined within "
                    f"{RENDEZVOUS_TIMEOUT / 60:.0f} minutes: read its output where it was started"
                )
            time.sleep(0.05)

    # Agreement

    def broadcast(self, value: Any) -> Any:
        self._sequence += 1
        key = self._key(f"sequence/{self._sequence}")
        if self.ranks.rank == 0:
            self._store.set(key, json.dumps(value))
            return value
        return self._json(key)

    def barrier(self) -> None:
        self._sequence += 1
        key = self._key(f"sequence/{self._sequence}")
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.ranks.world:
            self._raise_if_any_is_gone()
            time.sleep(0.02)

    def agree(self, description: Mapping[str, Any]) -> None:
        """Compare every rank's configuration with rank 0's; all ranks refuse, not only one."""
        keys = [self._key(f"config/{rank}") for rank in range(self.ranks.world)]
        self._store.set(keys[self.ranks.rank], json.dumps(description, sort_keys=True, default=str))
        first, *others = map(self._json, keys)
        for rank, other in enumerate(others, 1):
            differing = _differing(first, other)
            if differing:
                raise UserError(
                    f"rank {rank} was started with another configuration than rank 0: "
                    f"{', '.join(differing[:5])}; give every rank the same command"
                )

    def _key(self, name: str) -> str:
        """A key of this run alone: a sweep has several, one after the other."""
        return f"run/{self._run}/{name}"

    def _json(self, key: str) -> Any:
        """The value of a key, once it is there.

        Raises:
            UserError: another program wrote it.
        """
        try:
            return json.loads(self._wait_for(key))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"the rendezvous store at {self.ranks.address}:{self.ranks.port} holds what no "
                "rank wrote: choose a port of your own with MASTER_PORT"
            ) from error

    def _wait_for(self, key: str) -> bytes:
        """The value of a key once it is there, in steps short enough for Ctrl-C.

        Raises:
            RankGone: a rank ended, so that nobody may set it any more.
        """
        while not self._store.check([key]):
            self._raise_if_any_is_gone()
            time.sleep(0.02)
        return self._store.get(key)

    def _raise_if_any_is_gone(self) -> None:
        for line in self._gone.values():
            raise RankGone(f"{line}; rank {self.ranks.rank} ends too")

    # Failures

    @contextmanager
    def monitoring(self) -> Iterator[None]:
        """Inside, a rank that ends also ends this one; outside, ranks may end at any time."""
        self._run, self._sequence = self._run + 1, 0
        self._heartbeats, self._gone = {}, {}
        self._monitors, self._failing = True, False
        try:
            yield
        finally:
            self._monitors = False

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks why this one fails.

        Raises:
            RankGone: ``error`` is a collective's, and another rank's end is its cause.
        """
        self._failing = True
        if not _of_a_collective(error):
            with suppress(Exception):
                line = (str(error).splitlines() or [type(error).__name__])[0]
                self._store.set(self._key(f"ended/{self.ranks.rank}"), line[:PARTING_WORDS])
            return
        # A launcher that saw the other die asks this one to end as well: that is no preemption.
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        deadline = time.monotonic() + DIAGNOSIS_TIMEOUT
        while time.monotonic() < deadline:
            self._heartbeat(self._store, DIAGNOSIS_TIMEOUT / 2)
            for line in self._gone.values():
                raise RankGone(f"{line}; rank {self.ranks.rank} ends too") from error
            time.sleep(HEARTBEAT_INTERVAL)

    def leave(self) -> None:
        """Leave the group; the host of the store waits for the others, who still read from it."""
        if self._store_lost:
            return
        with suppress(Exception):
            key = self._key("left")
            left = self._store.add(key, 1)
            deadline = time.monotonic() + (SHUTDOWN_TIMEOUT if self._hosts else 0)
            while left < self.ranks.world and time.monotonic() < deadline:
                time.sleep(0.02)
                left = self._store.add(key, 0)

    def _send_heartbeats(self, store) -> None:
        """Send heartbeats and check those of the others, until the process ends."""
        others_ended = None
        while not self._stopping.is_set():
            self._heartbeat(store, HEARTBEAT_TIMEOUT)
            if not self._gone or not self._monitors or self._failing:
                others_ended = None
            elif others_ended is None:
                # This rank may be about to fail by itself, with a better message.
                others_ended = time.monotonic()
            elif time.monotonic() > others_ended + DIAGNOSIS_TIMEOUT:
                line = f"{next(iter(self._gone.values()))}; rank {self.ranks.rank} ends too"
                print(for_terminal(f"error: {line}"), file=sys.stderr, flush=True)
                os._exit(1)
            self._stopping.wait(HEARTBEAT_INTERVAL)

    def _stop_heartbeats(self) -> None:
        self._stopping.set()
        self._thread.join(SHUTDOWN_TIMEOUT)

    def _heartbeat(self, store, timeout: float) -> None:
        """Send a heartbeat; note which ranks ended, and which sent none for ``timeout`` seconds."""
        if self._store_lost:
            return
        try:
            store.add(f"heartbeat/{self.ranks.rank}", 1)
            for rank in range(self.ranks.world):
                if rank != self.ranks.rank:
                    self._check_rank(rank, store, timeout)
        except Exception:  # without the store, nothing is known of any rank
            self._store_lost = True
            host = "the torchrun of rank 0" if self._torchrun_hosts else "rank 0"
            self._gone.setdefault(0, f"{host} is gone: it hosted the rendezvous store")

    def _check_rank(self, rank: int, store, timeout: float) -> None:
        ended = self._key(f"ended/{rank}")
        if store.check([ended]):
            words = for_terminal(store.get(ended).decode(errors="replace"))
            self._gone[rank] = f"rank {rank} ended: {words[:PARTING_WORDS]}"
            return
        beats, now = store.add(f"heartbeat/{rank}", 0), time.monotonic()
        if self._heartbeats.get(rank, (-1, now))[0] != beats:
            self._heartbeats[rank] = (beats, now)
        elif now - self._heartbeats[rank][1] > timeout:
            self._gone[rank] = f"rank {rank} is gone: it sends no heartbeat"


def _of_a_collective(error: BaseException) -> bool:
    """Whether an error only says that a connection to another rank, or to the store, broke."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and bool(re.search(r"gloo|nccl|connection (closed|reset|refused)", str(error), re.I))
    )


def _differing(first: Any, other: Any, key: str = "") -> list[str]:
    """``trainer.batch_size=8 and 16`` for every value that is not the same."""
    if isinstance(first, dict) and isinstance(other, dict):
        return [
            found
            for name in sorted({*first, *other})
            for found in _differing(
                first.get(name), other.get(name), f"{key}.{name}" if key else name
            )
        ]
    return [] if first == other else [f"{key}={first} and {other}"]
