"""Stage ``domains``: the domains' text, split into pretraining, training and evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steerlora.config import Config, DomainsConfig
from steerlora.data.domains import micro
from steerlora.data.domains.hub import writer as hub
from steerlora.data.domains.micro import WORLD_VERSION
from steerlora.data.domains.micro.words import DOMAINS
from steerlora.data.domains.text import writer as text
from steerlora.engine.content import sha256
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DomainsSettings:
    """Attributes: version: of the micro world, a digest of the user's files, or the sources."""

    domains: DomainsConfig
    version: str


def step(config: Config) -> Step:
    domains = config.domains
    versions = {
        "micro": lambda: str(WORLD_VERSION),
        "text": lambda: _digest(Path(domains.dir), domains.names),
        "hub": lambda: hub.identity(domains),
    }
    version = versions[domains.kind]()
    settings = DomainsSettings(domains=domains, version=version)
    return Step("domains", settings, {}, f"domains {domains.name}", cost=3)


def _digest(folder: Path, names: Sequence[str]) -> str:
    """SHA-256 over those files of a folder that are read for the domains."""
    if not folder.is_dir():
        raise UserError(f"domains.dir={folder}: there is no such folder")
    digest = hashlib.sha256()
    for path in text.files_of(folder, names):
        digest.update(path.name.encode())
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()[:20]


# Places do not matter, content does: it is in the version, as is the broad domain where it counts.
@stage(
    "domains",
    2,
    step=step,
    skip=frozenset({"domains.dir", "domains.sources", "domains.name", "domains.broad"}),
)
def build(context: Context) -> dict:
    domains: DomainsConfig = context.config.domains
    if domains.kind == "micro":
        if list(domains.names) != list(DOMAINS):
            raise UserError(f"domains.names: the micro world has {', '.join(DOMAINS)}")
        micro.write(
            context.directory,
            seed=domains.seed,
            pretraining_items=domains.pretrain_items,
            train_items_per_domain=domains.train_items,
            evaluation_items=domains.evaluation_items,
        )
    elif domains.kind == "hub":
        hub.write(context.directory, domains, context.progress, context.label)
    else:
        text.write(
            context.directory,
            source=Path(domains.dir),
            seed=domains.seed,
            names=tuple(domains.names),
            pretrain_items=domains.pretrain_items,
            train_items=domains.train_items,
            evaluation_items=domains.evaluation_items,
            prompt_characters=domains.prompt_characters,
        )
    return {"kind": domains.kind, "domains": list(domains.names)}
