"""Stored outputs: how they are named, built and found.

An artifact is a directory ``<root>/<stage>/<fingerprint>/``. Its ``manifest.json`` is written last
and the directory renamed into place after it, so that a folder with the final name is complete.
Beside it may lie ``.partial`` (work in progress, resumed and never trusted), ``.corrupt`` (moved
aside by a failed check) and ``.lock`` (held by the process that builds).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from steerlora.engine.machine import this_machine
from steerlora.engine.manifests import (
    ATTEMPT,
    CHECKPOINTS,
    FINGERPRINT_DIGITS,
    MANIFEST,
    compare_files,
    describe_files,
    library_versions,
    plain,
    read_attempt,
    read_json,
    read_manifest,
    sealed,
    stat_files,
    write_json,
)
from steerlora.errors import UserError
from steerlora.text import for_terminal

LOCK_PATIENCE = 1.0  # seconds of silent waiting for another process

logger = logging.getLogger(__name__)


def fingerprint(stage: str, version: int | str, config: Mapping, inputs: Mapping[str, str]) -> str:
    """The name of a stage's output: a SHA-256 over all that decides it, `FINGERPRINT_DIGITS` long.

    Args:
        stage: the stage's registered name.
        version: the stage's version, raised when its code changes what it writes.
        config: what the output depends on, less the stage's skip list.
        inputs: the fingerprints of the upstream artifacts by input name.
    """
    content = {"stage": stage, "version": version, "config": config, "inputs": inputs}
    text = json.dumps(plain(content, stage), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_DIGITS]


@dataclass(frozen=True)
class Artifact:
    """A complete stored output. ``artifact / "weights.safetensors"`` is a path in it."""

    stage: str
    """Name of the stage that built it."""

    fingerprint: str
    """SHA-256 of all that it depends on, `FINGERPRINT_DIGITS` long."""

    path: Path
    """Its folder."""

    manifest: dict
    """The content of its ``manifest.json``: files, configuration, inputs, versions, times,
    the machine that built it."""

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def json(self, name: str) -> Any:
        """The content of the JSON file ``name`` in the artifact."""
        return read_json(self.path / name)


class ArtifactStore:
    """The artifacts under one root, shared by any number of processes.

    Args:
        root: the directory that holds them; made when first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self._verified: dict[Path, tuple] = {}  # directory -> stat of its files when last hashed

    def directory(self, stage: str, fingerprint: str) -> Path:
        """Where the artifact is, or will be."""
        return self.root / stage / fingerprint

    def unfinished(self, stage: str, fingerprint: str) -> Path:
        """Where the artifact is while it is built."""
        return _beside(self.directory(stage, fingerprint), ".partial")

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The artifact if it is there, complete and intact; ``None`` if it has to be built.

        Every file's size and SHA-256 are compared with the manifest, once per store and again
        when a file's stat has changed. A damaged artifact is moved aside with a warning.
        """
        artifact, problem = self._inspect(stage, fingerprint)
        if problem is None:
            return artifact
        with self._locked(stage, fingerprint, logger.warning):
            return self._find_or_move_aside(stage, fingerprint)

    def build(
        self,
        stage: str,
        fingerprint: str,
        record: Mapping[str, Any],
        builder: Callable[[Path], Mapping | None],
        message: Callable[[str], None] = logger.warning,
    ) -> Artifact:
        """The artifact, built unless it exists. One process builds, the others wait for it.

        Args:
            record: what the manifest says besides: version, config, inputs, seed, label.
            builder: fills the directory it is given, which may hold an interrupted attempt's
                files; returns a summary for the manifest. Its folder ``checkpoints/`` is not kept.
            message: receives the line that says another process is being waited for.

        Raises:
            UserError: the disk is full, or the root cannot be written to.
        """
        final = self.directory(stage, fingerprint)
        partial = self.unfinished(stage, fingerprint)
        with self._locked(stage, fingerprint, message), self._disk_errors(stage, fingerprint):
            existing = self._find_or_move_aside(stage, fingerprint)
            if existing is not None:
                return existing
            partial.mkdir(exist_ok=True)
            (partial / MANIFEST).unlink(missing_ok=True)
            for stray in partial.rglob(".*.tmp"):  # of a `write_json` that was killed
                stray.unlink()
            attempt = {"seconds": 0.0, "label": record.get("label", "")} | read_attempt(partial)
            write_json(partial / ATTEMPT, attempt)
            began = time.monotonic()
            try:
                summary = builder(partial)
                assert not (partial / MANIFEST).exists(), f"{stage} wrote its own {MANIFEST}"
                manifest = sealed(
                    {
                        "label": "",
                        **record,
                        "stage": stage,
                        "fingerprint": fingerprint,
                        "summary": summary or {},
                        "files": describe_files(partial),
                        "wall_seconds": attempt["seconds"] + time.monotonic() - began,
                        "created": datetime.now(UTC).isoformat(timespec="seconds"),
                        "machine": this_machine(),
                        "library_versions": library_versions(),
                    },
                    f"{stage}/{MANIFEST}",
                )
                write_json(partial / MANIFEST, manifest)
            except BaseException:
                attempt["seconds"] += time.monotonic() - began
                with suppress(OSError):  # a full disk must not hide the builder's own error
                    write_json(partial / ATTEMPT, attempt)
                raise
            _sync_directory(partial)
            partial.replace(final)
            _sync_directory(final.parent)
        # Only now: until the rename, they are what an interrupted finish would resume from.
        shutil.rmtree(final / CHECKPOINTS, ignore_errors=True)
        (final / ATTEMPT).unlink(missing_ok=True)
        self._verified[final] = stat_files(final, manifest["files"])
        return Artifact(stage, fingerprint, final, manifest)

    @contextmanager
    def _locked(
        self, stage: str, fingerprint: str, message: Callable[[str], None]
    ) -> Iterator[None]:
        final = self.directory(stage, fingerprint)
        with self._disk_errors(stage, fingerprint):
            final.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(_beside(final, ".lock"))
            try:
                lock.acquire(timeout=LOCK_PATIENCE)
            except filelock.Timeout:
                message(f"waiting for another process that builds {stage}/{fingerprint}")
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _disk_errors(self, stage: str, fingerprint: str) -> Iterator[None]:
        """A `UserError` in place of an error of the disk's."""
        try:
            yield
        except Exception as error:
            if _is_disk_full(error):
                raise UserError(
                    f"no space left on the disk of {self.root} while building {stage}/"
                    f"{fingerprint}: free some (steerlora stage=status lists sizes) or move with "
                    "artifacts.root=DIR, then run the same command again"
                ) from error
            named = getattr(error, "filename", None)
            if isinstance(error, OSError) and named and self._refuses(error.errno, Path(named)):
                raise UserError(
                    f"cannot write {named} ({error.strerror}): "
                    "choose another place with artifacts.root=DIR"
                ) from error
            raise

    def _refuses(self, code: int | None, named: Path) -> bool:
        """Whether an error says that the root, or something in it, cannot be written to."""
        codes = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EROFS)
        inside = named.is_relative_to(self.root) and code in (*codes, errno.ENAMETOOLONG)
        return inside or self.root.is_relative_to(named)

    def _find_or_move_aside(self, stage: str, fingerprint: str) -> Artifact | None:
        """`find` for the holder of the lock."""
        artifact, problem = self._inspect(stage, fingerprint)
        if problem is not None:
            directory = self.directory(stage, fingerprint)
            aside = _beside(directory, ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            directory.replace(aside)
            logger.warning(
                "artifact %s/%s is damaged: %s; it is moved to %s and built again",
                *(stage, fingerprint, for_terminal(problem), aside),
            )
        return artifact

    def _inspect(self, stage: str, fingerprint: str) -> tuple[Artifact | None, str | None]:
        """The intact artifact, or what is wrong with it; neither where there is none."""
        directory = self.directory(stage, fingerprint)
        if not directory.is_dir():
            return None, None
        manifest, problem = read_manifest(directory)
        if problem is None:
            stats = stat_files(directory, manifest["files"])
            if self._verified.get(directory) != stats:
                problem = compare_files(directory, manifest["files"])
            if problem is None:
                self._verified[directory] = stats
                return Artifact(stage, fingerprint, directory, manifest), None
        return (None, problem) if directory.is_dir() else (None, None)


def _beside(final: Path, suffix: str) -> Path:
    return final.with_name(final.name + suffix)


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the disk or the quota is full."""
    while error is not None:
        # safetensors and torch report it in words only
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or re.search(
            r"No space left on device|os error 28|Disk quota exceeded"
            r"|PytorchStreamWriter failed writing|inline_container.*unexpected pos",
            str(error),
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
