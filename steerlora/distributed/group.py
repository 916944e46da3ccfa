"""The meeting of all ranks: where they agree on what to do, and watch that all of them live.

They talk through a key-value store, which torchrun keeps, or else rank 0. A rank that dies leaves
the others waiting in a collective, some of them for ever: every rank therefore gives signs of life
and looks for the others', and ends with a line that says which one is gone.
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

from steerlora.distributed.ranks import Ranks
from steerlora.errors import RankGone, UserError

BEAT = 1.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a rank counts as gone
TRACE = 12.0  # seconds to look for a rank that is gone, once a collective has failed
MEETING = 600.0  # seconds that the first rank to come waits for the last
FAREWELL = 3.0  # seconds that the keeper of the store stays on for others to read in it


class Group:
    """All ranks of a process's lifetime: process group, key-value store, signs of life.

    Args:
        ranks: this process's.

    Raises:
        UserError: the others cannot be reached, or do not come.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self._run, self._turn = ranks, 0, 0
        self._watches, self._failing, self._deaf = False, False, False
        self._heard: dict[int, tuple[int, float]] = {}  # rank: its last beat, and when
        self._gone: dict[int, str] = {}  # rank: what became of it
        self._by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._keeps = ranks.rank == 0 and not self._by_agent
        self._store = self._connect(keeps=self._keeps)
        self._meet()
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
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._follow, args=(self._connect(),), daemon=True)
        self._watch.start()
        # An interpreter that ends while a thread is inside the store's C++ is aborted.
        atexit.register(self._stop_following)

    def _connect(self, *, keeps: bool = False):
        place = f"{self.ranks.address}:{self.ranks.port}"
        try:
            store = dist.TCPStore(
                self.ranks.address,
                self.ranks.port,
                is_master=keeps,
                timeout=timedelta(seconds=MEETING),
                wait_for_workers=False,
            )
        except dist.DistError as error:
            raise UserError(
                f"rank {self.ranks.rank} cannot {'keep' if keeps else 'reach'} the place where "
                f"ranks meet, {place} ({str(error).splitlines()[0]}); MASTER_ADDR and MASTER_PORT "
                "say where it is"
            ) from error
        # torchrun keeps its store over restarts: what ranks said before must not count.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"steerlora/{attempt}", store)

    def _meet(self) -> None:
        """Wait until every rank has come: collectives would wait for hours, and name nobody."""
        keys = [f"here/{rank}" for rank in range(self.ranks.world)]
        self._store.set(keys[self.ranks.rank], "")
        deadline = time.monotonic() + MEETING
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                late = [str(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
                raise UserError(
                    f"of {self.ranks.world} ranks, rank {', '.join(late)} has not come within "
                    f"{MEETING / 60:.0f} minutes: see what it says where it was started"
                )
            time.sleep(0.05)

    # Agreement

    def broadcast(self, value: Any) -> Any:
        self._turn += 1
        key = self._key(f"turn/{self._turn}")
        if self.ranks.rank == 0:
            self._store.set(key, json.dumps(value))
            return value
        return json.loads(self._hear(key))

    def barrier(self) -> None:
        self._turn += 1
        key = self._key(f"turn/{self._turn}")
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.ranks.world:
            self._refuse_to_wait_for_the_dead()
            time.sleep(0.02)

    def agree(self, description: Mapping[str, Any]) -> None:
        """Compare every rank's configuration with rank 0's; all ranks refuse, not only one."""
        keys = [self._key(f"config/{rank}") for rank in range(self.ranks.world)]
        self._store.set(keys[self.ranks.rank], json.dumps(description, sort_keys=True, default=str))
        first, *others = (json.loads(self._hear(key)) for key in keys)
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

    def _hear(self, key: str) -> bytes:
        """The value of a key once it is there, in steps short enough for Ctrl-C.

        Raises:
            RankGone: nobody will say it any more.
        """
        while not self._store.check([key]):
            self._refuse_to_wait_for_the_dead()
            time.sleep(0.02)
        return self._store.get(key)

    def _refuse_to_wait_for_the_dead(self) -> None:
        for line in self._gone.values():
            raise RankGone(f"{line}; rank {self.ranks.rank} ends too")

    # Life and death

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a rank that ends takes this one with it; outside, ranks come and go."""
        self._run, self._turn = self._run + 1, 0
        self._heard, self._gone = {}, {}
        self._watches, self._failing = True, False
        try:
            yield
        finally:
            self._watches = False

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends; where it ends because of another, say which.

        Raises:
            RankGone: ``error`` is a collective's, and comes of another rank's end.
        """
        self._failing = True
        if not _of_a_collective(error):
            with suppress(Exception):
                line = (str(error).splitlines() or [type(error).__name__])[0]
                self._store.set(self._key(f"ended/{self.ranks.rank}"), line[:300])
            return
        # A launcher that saw the other die asks this one to end as well: that is no preemption.
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        deadline = time.monotonic() + TRACE
        while time.monotonic() < deadline:
            self._look(self._store, TRACE / 2)
            for line in self._gone.values():
                raise RankGone(f"{line}; rank {self.ranks.rank} ends too") from error
            time.sleep(BEAT)

    def leave(self) -> None:
        """The keeper of the meeting place leaves last: the others still read what was said."""
        if self._deaf:
            return
        with suppress(Exception):
            key = self._key("left")
            gone = self._store.add(key, 1)
            deadline = time.monotonic() + (FAREWELL if self._keeps else 0)
            while gone < self.ranks.world and time.monotonic() < deadline:
                time.sleep(0.02)
                gone = self._store.add(key, 0)

    def _follow(self, store) -> None:
        """Give signs of life and look for those of the others, until the process ends."""
        others_ended = None
        while not self._over.is_set():
            self._look(store, SILENCE)
            if not self._gone or not self._watches or self._failing:
                others_ended = None
            elif others_ended is None:
                # This rank may be about to fail by itself, and say it better.
                others_ended = time.monotonic()
            elif time.monotonic() > others_ended + TRACE:
                line = f"{next(iter(self._gone.values()))}; rank {self.ranks.rank} ends too"
                print(f"error: {line}", file=sys.stderr, flush=True)
                os._exit(1)
            self._over.wait(BEAT)

    def _stop_following(self) -> None:
        self._over.set()
        self._watch.join(FAREWELL)

    def _look(self, store, silence: float) -> None:
        """Give a sign of life; note which ranks ended, and which gave none for so many seconds."""
        if self._deaf:
            return
        try:
            store.add(f"alive/{self.ranks.rank}", 1)
            for rank in range(self.ranks.world):
                if rank != self.ranks.rank:
                    self._look_at(rank, store, silence)
        except Exception:  # no store, no word of any rank
            self._deaf = True
            keeper = "the torchrun of rank 0" if self._by_agent else "rank 0"
            self._gone.setdefault(0, f"{keeper} is gone: it kept the place where ranks meet")

    def _look_at(self, rank: int, store, silence: float) -> None:
        ended = self._key(f"ended/{rank}")
        if store.check([ended]):
            self._gone[rank] = f"rank {rank} ended: {store.get(ended).decode()}"
            return
        beats, now = store.add(f"alive/{rank}", 0), time.monotonic()
        if self._heard.get(rank, (-1, now))[0] != beats:
            self._heard[rank] = (beats, now)
        elif now - self._heard[rank][1] > silence:
            self._gone[rank] = f"rank {rank} is gone without a word"


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
