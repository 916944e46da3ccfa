"""What an artifact was built from: the artifacts it read, those that they read, and so on.

Manifests name inputs by fingerprint, so the whole ancestry of an artifact can be read from the
manifests under one root. Only manifests are read: files are neither opened nor checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from steerlora.engine.artifacts import Artifact
from steerlora.engine.manifests import FINGERPRINT_DIGITS, MANIFEST, read_manifest

FINGERPRINT = re.compile(rf"[0-9a-f]{{{FINGERPRINT_DIGITS}}}")


class Library:
    """The complete artifacts under a root, by fingerprint; each manifest is read once.

    Args:
        root: the folder of all artifacts.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self._found: dict[str, Artifact | None] = {}

    def find(self, fingerprint: str) -> Artifact | None:
        """The artifact with this fingerprint, of whatever stage; None where there is none."""
        if fingerprint not in self._found:
            folders = self.root.glob(f"*/{fingerprint}/{MANIFEST}")
            self._found[fingerprint] = next(
                (artifact for path in folders if (artifact := read(path.parent))), None
            )
        return self._found[fingerprint]

    def all(self) -> Iterator[Artifact]:
        """Every artifact, by stage and time of completion."""
        for path in self.root.glob(f"*/*/{MANIFEST}"):
            if FINGERPRINT.fullmatch(path.parent.name):
                self._found.setdefault(path.parent.name, read(path.parent))
        known = [artifact for artifact in self._found.values() if artifact]
        yield from sorted(
            known, key=lambda one: (one.stage, one.manifest.get("created", ""), one.fingerprint)
        )

    def ancestry(self, *artifacts: Artifact) -> list[Artifact]:
        """The artifacts and everything that they were built from, each once, inputs first.

        An input that is no longer stored is left out.
        """
        ordered: dict[str, Artifact] = {}

        def visit(artifact: Artifact) -> None:
            if artifact.fingerprint in ordered:
                return
            for fingerprint in _inputs(artifact):
                if found := self.find(fingerprint):
                    visit(found)
            ordered[artifact.fingerprint] = artifact

        for artifact in artifacts:
            visit(artifact)
        return list(ordered.values())


def _inputs(artifact: Artifact) -> Iterable[str]:
    return artifact.manifest.get("inputs", {}).values()


def read(folder: Path) -> Artifact | None:
    """The artifact in a folder, by its manifest alone; None where there is no manifest."""
    manifest, problem = read_manifest(folder)
    return None if problem else Artifact(folder.parent.name, folder.name, folder, manifest)
