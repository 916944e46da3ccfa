"""NLTK's sentence splitter for ``ifeval``, also where its data cannot be downloaded.

lm-eval's ``ifeval`` imports NLTK and looks for the ``punkt_tab`` data, which only a download gives.
Without it a stand-in is trained on local text. It decides where sentences end, so it touches
sentence counts and capital-word counts only, but a score that used it has to say so.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from steerlora.errors import UserError

_PACKAGES = ("langdetect", "immutabledict", "nltk")
_DATA = "tokenizers/punkt_tab"
_MARKER = "STAND_IN.txt"
_TRAINING_CHARACTERS = 300_000
"""Enough for common abbreviations and sentence starters; a second or two of training."""
_NOTE = "Trained by steerlora on local text in place of NLTK's punkt_tab, which was not found.\n"


def ensure_punkt(directory: Path, texts: Iterable[str]) -> bool:
    """Make NLTK find English ``punkt_tab`` data: its own if installed, else a stand-in.

    Call it before anything imports lm-eval's ``ifeval``, which looks for the data when imported.
    ``NLTK_DATA`` is extended by ``directory``, for this process and its children.

    Args:
        directory: an NLTK data folder for the stand-in, kept for later calls.
        texts: English text to train it on; read only if a stand-in has to be made.

    Returns:
        Whether a stand-in is in use.

    Raises:
        UserError: a package that ``ifeval`` needs is not installed.
    """
    require_ifeval_packages()
    _extend_search_path(directory)
    import nltk

    try:
        found = nltk.data.find(f"{_DATA}/english/")
    except LookupError:
        _train(directory / _DATA, texts)
        return True
    return Path(str(found), _MARKER).exists()


def require_ifeval_packages() -> None:
    """Raise a :class:`UserError` that names the extra to install, unless it is installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the ifeval task needs {', '.join(missing)}: pip install 'steerlora[text]'"
        )


def _extend_search_path(directory: Path) -> None:
    """Append ``directory`` to where NLTK looks, whether or not it has been imported yet."""
    paths = [path for path in os.environ.get("NLTK_DATA", "").split(os.pathsep) if path]
    own = str(directory.resolve())
    if own not in paths:
        os.environ["NLTK_DATA"] = os.pathsep.join([*paths, own])
    import nltk

    if own not in nltk.data.path:
        nltk.data.path.append(own)


def _train(destination: Path, texts: Iterable[str]) -> None:
    """Train on ``texts`` and move the finished model to ``destination/english`` in one step."""
    from nltk.tabdata import TabEncoder
    from nltk.tokenize.punkt import PunktTrainer

    trainer, characters = PunktTrainer(), 0
    for text in texts:
        if characters >= _TRAINING_CHARACTERS:
            break
        trainer.train(text, finalize=False)
        characters += len(text)
    trainer.finalize_training()
    parameters, encode = trainer.get_params(), TabEncoder()
    # nltk's save_punkt_params writes the same files, but in an order that changes from run to run,
    # and not below a folder that a group may write to.
    files = {
        "collocations.tab": encode.tups2tab(sorted(parameters.collocations)),
        "sent_starters.txt": encode.set2txt(sorted(parameters.sent_starters)),
        "abbrev_types.txt": encode.set2txt(sorted(parameters.abbrev_types)),
        "ortho_context.tab": encode.ivdict2tab(dict(sorted(parameters.ortho_context.items()))),
        _MARKER: _NOTE,
    }
    destination.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=destination.parent))
    try:
        for name, content in files.items():
            (staging / name).write_text(content, encoding="utf-8")
        staging.chmod(0o755)
        staging.rename(destination / "english")
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        if not (destination / "english" / _MARKER).exists():  # else another process was first
            raise
