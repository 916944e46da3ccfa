"""Our artifacts as W&B knows them: by fingerprint, as references, nothing is copied.

W&B draws the graph of runs from what each run used and made. An artifact there is named after its
stage and fingerprint, has the stage as its type, and holds one reference to our folder whose digest
is the fingerprint: runs in several places that build the same thing make one version of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerlora.engine.artifacts import Artifact


def use(run: Any, artifact: Artifact) -> None:
    """Log that a run reads an artifact.

    ``Run.use_artifact`` refuses to work offline, though the file format has the record: it is
    written by the method behind it, whose record ``wandb sync`` turns into a use.
    """
    run._log_artifact(
        _described(artifact, {}), aliases=[], is_user_created=True, use_after_commit=True
    )


def make(run: Any, artifact: Artifact, settings: Mapping[str, Any]) -> None:
    """Log that a run has made an artifact; its settings are shown with it."""
    run.log_artifact(_described(artifact, settings))


def _described(artifact: Artifact, settings: Mapping[str, Any]) -> Any:
    import wandb
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

    label = artifact.manifest.get("label", "")
    described = wandb.Artifact(
        f"{artifact.stage}-{artifact.fingerprint}",
        type=artifact.stage,
        description=label,
        # Nested, since W&B takes no more than a hundred keys.
        metadata={"path": str(artifact.path), "settings": dict(settings)},
    )
    # Not `add_reference`: it hashes the files, or their places, and wants them to exist already.
    described.manifest.add_entry(
        ArtifactManifestEntry(
            path="artifact", ref=artifact.path.as_uri(), digest=artifact.fingerprint, size=0
        )
    )
    return described
