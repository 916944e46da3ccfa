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
from contextlib import ExitStack, contextmanager, suppress
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
        built = self.build_together(
            stage,
            {fingerprint: record},
            lambda folders: {fingerprint: builder(folders[fingerprint])},
            message,
        )
        return built[fingerprint]

    def build_together(
        self,
        stage: str,
        records: Mapping[str, Mapping[str, Any]],
        builder: Callable[[dict[str, Path]], Mapping[str, Mapping | None]],
        message: Callable[[str], None] = logger.warning,
    ) -> dict[str, Artifact]:
        """Several artifacts of a stage, those that do not exist by one call of the builder.

        Args:
            records: {fingerprint: as for :meth:`build`}.
            builder: fills {fingerprint: folder} of those that are missing; returns their summaries.
            message: as for :meth:`build`.

        Returns:
            {fingerprint: artifact}, of all.

        Raises:
            UserError: as :meth:`build`.
        """
        found: dict[str, Artifact] = {}
        with ExitStack() as held:
            for name in sorted(records):  # in one order, lest two processes wait for each other
                held.enter_context(self._locked(stage, name, message))
            held.enter_context(self._disk_errors(stage, ", ".join(records)))
            for name in records:
                if existing := self._find_or_move_aside(stage, name):
                    found[name] = existing
            folders = {n: self.unfinished(stage, n) for n in records if n not in found}
            attempts = {name: _begin(folders[name], records[name]) for name in folders}
            began = time.monotonic()
            manifests = {}
            try:
                summaries = builder(folders) if folders else {}
                each = (time.monotonic() - began) / max(1, len(folders))
                for name, folder in folders.items():
                    assert not (folder / MANIFEST).exists(), f"{stage} wrote its own {MANIFEST}"
                    manifests[name] = sealed(
                        {
                            "label": "",
                            **records[name],
                            "stage": stage,
                            "fingerprint": name,
                            "summary": summaries[name] or {},
                            "files": describe_files(folder),
                            "wall_seconds": attempts[name]["seconds"] + each,
                            "created": datetime.now(UTC).isoformat(timespec="seconds"),
                            "machine": this_machine(),
                            "library_versions": library_versions(),
                        },
                        f"{stage}/{MANIFEST}",
                    )
                    write_json(folder / MANIFEST, manifests[name])
            except BaseException:
                each = (time.monotonic() - began) / len(folders)
                for name, attempt in attempts.items():
                    attempt["seconds"] += each
                    with suppress(OSError):  # a full disk must not hide the builder's own error
                        write_json(folders[name] / ATTEMPT, attempt)
                raise
            for name, folder in folders.items():
                final = self.directory(stage, name)
                _sync_directory(folder)
                folder.replace(final)
                _sync_directory(final.parent)
        for name, manifest in manifests.items():
            final = self.directory(stage, name)
            # Only now: until the rename, they are what an interrupted finish would resume from.
            shutil.rmtree(final / CHECKPOINTS, ignore_errors=True)
            (final / ATTEMPT).unlink(missing_ok=True)
            self._verified[final] = stat_files(final, manifest["files"])
            found[name] = Artifact(stage, name, final, manifest)
        return found

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


def _begin(partial: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Make the folder ready for an attempt; what earlier ones took, and the label."""
    partial.mkdir(exist_ok=True)
    (partial / MANIFEST).unlink(missing_ok=True)
    for stray in partial.rglob(".*.tmp"):  # of a writing that was killed
        stray.unlink()
    attempt = {"seconds": 0.0, "label": record.get("label", "")} | read_attempt(partial)
    write_json(partial / ATTEMPT, attempt)
    return attempt


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
