"""The identity of files is their content: its SHA-256, computed once while they stay as they are.

Models are gigabytes, and every start asks which one this is. A small JSON file beside the artifacts
therefore remembers each file's hash with what changes when the file is written to.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from steerlora.engine.manifests import FINGERPRINT_DIGITS, read_json, write_json
from steerlora.errors import UserError

MEMORY = "content.json"
"""Name of the file that remembers, under the artifacts' root."""
SETTLED = 2.0
"""Seconds since a file changed after which its hash is remembered: a clock of the file system may
stand still for that long, so that a second change would leave no trace."""
THREADS = 8
ANNOUNCED = 4 * 2**30
"""Bytes to read from which on a line says so: seconds of silence."""

_log = logging.getLogger(__name__)


def identity_of(files: Mapping[str, Path], root: str | Path) -> str:
    """What decides what is read from files: their names there and their bytes, not where they lie.

    Args:
        files: {what the reader calls it: the file}.
        root: of the artifacts, where hashes are remembered.

    Raises:
        UserError: a file cannot be read.
    """
    hashes = ContentHashes(Path(root).expanduser() / MEMORY).of(list(files.values()))
    digest = hashlib.sha256()
    for name, content in sorted(zip(files, hashes, strict=True)):
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


class ContentHashes:
    """SHA-256 of files, remembered between runs. A file that has changed is read again.

    Args:
        memory: the JSON file: {path: [state, hash]}. One that cannot be read or written to is
            done without.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory

    def of(self, files: Sequence[Path]) -> list[str]:
        """The hashes of files, in their order.

        Raises:
            UserError: a file cannot be read.
        """
        files = [file.absolute() for file in files]
        known = self._known(files)
        if len(known) < len(set(files)):
            # Of several processes that start together, one reads the files.
            with self._alone():
                known = self._known(files)
                known |= self._read([file for file in dict.fromkeys(files) if file not in known])
        return [known[file] for file in files]

    def _known(self, files: Sequence[Path]) -> dict[Path, str]:
        remembered = self._remembered()
        found = {}
        for file in files:
            state, content = remembered.get(str(file), (None, None))
            if state is not None and state == _state(file):
                found[file] = content
        return found

    def _read(self, files: Sequence[Path]) -> dict[Path, str]:
        """The hashes of files that are not known yet."""
        began = time.time()
        # Before they are read: what changes meanwhile is read again next time.
        states = [_state(file) for file in files]
        size = sum(state[0] for state in states)
        if size >= ANNOUNCED:
            _log.info("reading %.0f GiB once, to know the files again", size / 2**30)
        with ThreadPoolExecutor(THREADS) as threads:
            hashes = list(threads.map(sha256, files))
        settled = {
            str(file): [state, content]
            for file, state, content in zip(files, states, hashes, strict=True)
            if max(state[1:3]) < (began - SETTLED) * 1e9
        }
        if settled:
            try:
                self._memory.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._memory, self._remembered() | settled)
            except OSError as error:
                _log.debug("%s cannot be written: %s", self._memory, error)
        return dict(zip(files, hashes, strict=True))

    def _remembered(self) -> dict[str, Any]:
        """What the memory says that has the right form."""
        try:
            said = read_json(self._memory)
        except (UserError, OSError):
            return {}
        if not isinstance(said, dict):
            return {}
        return {
            path: entry
            for path, entry in said.items()
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
        }

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = filelock.FileLock(self._memory.with_name(f"{self._memory.name}.lock"))
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError:  # a folder that cannot be written to
            yield
            return
        try:
            yield
        finally:
            lock.release()


def open_file(path: Path) -> BinaryIO:
    """A file of the user's, to read its bytes.

    Raises:
        UserError: there is none (a link to nothing, or to itself), it may not be read, or it is a
            folder, or a pipe, which would be waited for.
    """
    _stat(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error


def sha256(path: Path) -> str:
    """SHA-256 of a file of the user's, of any size.

    Raises:
        UserError: as `open_file`.
    """
    with open_file(path) as stream:
        try:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(path, error) from error


def _stat(path: Path) -> os.stat_result:
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise UserError(f"{path} is {what}: a file is needed there")
    return found


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read: {error.strerror or error}")


def _state(path: Path) -> list[int]:
    """What changes when a file is written to or replaced: size, times, where it is on the disk."""
    found = _stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def absolute(path: str) -> str:
    """A local path as one name of its place, whatever folder a run starts in; a hub id as it is."""
    place = Path(path).expanduser()
    return os.path.realpath(place) if place.exists() else path
