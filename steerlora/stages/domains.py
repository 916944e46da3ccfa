"""Stage ``domains``: the domains' text, split into pretraining, training and evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steerlora.config import Config, DomainsConfig
from steerlora.data.domains import micro
from steerlora.data.domains.classification import writer as classification
from steerlora.data.domains.hub import writer as hub
from steerlora.data.domains.micro import WORLD_VERSION
from steerlora.data.domains.micro.words import DOMAINS
from steerlora.data.domains.text import writer as text
from steerlora.engine.content import sha256
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DomainsSettings:
    """Attributes: version: of the micro world, a digest of the user's files, or the sources;
    pretraining: whether rows are set aside for it, which the version says where they are not."""

    domains: DomainsConfig
    version: str
    pretraining: bool = True


def step(config: Config) -> Step:
    domains = config.domains
    versions = {
        "micro": lambda: str(WORLD_VERSION),
        "text": lambda: _digest(Path(domains.dir), text.files_of(Path(domains.dir), domains.names)),
        "classification": lambda: _of_classification(domains),
        "hub": lambda: hub.identity(domains),
    }
    version, pretraining = versions[domains.kind](), sets_aside(config)
    if not pretraining:
        version += " without pretraining"
    settings = DomainsSettings(domains=domains, version=version, pretraining=pretraining)
    return Step("domains", settings, {}, f"domains {domains.name}", cost=3)


def sets_aside(config: Config) -> bool:
    """Whether rows of the domains are set aside for pretraining; kinds of other text have theirs.

    Raises:
        UserError: there would be nothing to pretrain on.
    """
    wanted, here = config.domains.pretraining, config.model.path is None
    if config.domains.kind not in ("text", "hub"):
        return True
    if here and wanted is False:
        raise UserError(
            f"domains.pretraining=false leaves no text to pretrain {config.model.name} on: set it "
            "to null, or give a base that is trained, model.path=<folder>"
        )
    return here if wanted is None else wanted


def _of_classification(domains: DomainsConfig) -> str:
    """What the rows depend on that the settings do not say."""
    folder, general = Path(domains.dir), Path(domains.general) if domains.general else None
    files = classification.files_of(folder, domains.names)
    if general and not general.is_file():
        raise UserError(f"domains.general={general}: there is no such file")
    version = _digest(folder, [*files, *([general] if general else [])])
    return f"{version}-development" if domains.development else version


def _digest(folder: Path, files: Sequence[Path]) -> str:
    """SHA-256 over the names and bytes of files that are read for the domains."""
    if not folder.is_dir():
        raise UserError(f"domains.dir={folder}: there is no such folder")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()[:20]


# Places do not matter, content does: it is in the version, as is the broad domain where it counts.
@stage(
    "domains",
    2,
    step=step,
    skip=frozenset(
        f"domains.{key}"
        for key in ("dir", "sources", "general", "development", "name", "broad", "pretraining")
    )
    | {"pretraining"},
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
        hub.write(
            context.directory,
            domains,
            context.progress,
            context.label,
            pretraining=context.config.pretraining,
        )
    else:
        options = {
            "source": Path(domains.dir),
            "seed": domains.seed,
            "names": tuple(domains.names),
            "pretrain_items": domains.pretrain_items,
            "train_items": domains.train_items,
            "evaluation_items": domains.evaluation_items,
            "prompt_characters": domains.prompt_characters,
        }
        if domains.kind == "text":
            text.write(context.directory, **options, pretraining=context.config.pretraining)
        else:
            general = Path(domains.general) if domains.general else None
            options |= {"general": general, "development": domains.development}
            classification.write(context.directory, **options)
    return {"kind": domains.kind, "domains": list(domains.names)}
