"""JSON files, and the manifest that lists an artifact's files with their checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from steerlora.errors import UserError

FINGERPRINT_DIGITS = 20  # hexadecimal digits kept of a SHA-256: 80 bits
MANIFEST = "manifest.json"
OWN_HASH = "manifest_sha256"  # key of a manifest's own hash
CHECKPOINTS = "checkpoints"  # the builder's own folder, dropped when the artifact is complete
ATTEMPT = ".attempt.json"  # record of a build in progress: its label and the seconds spent
LIBRARIES = (
    *("steerlora", "torch", "transformers", "lightning", "deepspeed", "lm-eval", "datasets"),
    *("tokenizers", "safetensors", "hydra-core", "numpy", "scipy", "pandas", "matplotlib"),
)


def plain(value: Any, name: str = "value") -> Any:
    """``value`` in JSON's own types: dataclasses, paths, tuples, enums and arrays normalised.

    Raises:
        UserError: a number is not finite, which JSON cannot store (use ``null`` for "off").
        TypeError: a type that has no JSON form.
    """
    if value is None or (isinstance(value, (bool, str)) and not isinstance(value, Enum)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return plain(fields, name)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item, name) for item in value)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Enum):
        return plain(value.value, name)
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}: only finite numbers can be stored (null for none)")
        return float(value)
    if hasattr(value, "tolist"):  # NumPy and torch, scalars and arrays
        return plain(value.tolist(), name)
    raise TypeError(f"{name} is a {type(value).__name__}, which has no JSON form")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all.

    Raises:
        UserError: a number in it is not finite.
    """
    text = json.dumps(plain(value, Path(path).name), indent=2, ensure_ascii=False) + "\n"
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: the file is missing or is not JSON; names the file and the line.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not valid JSON: {error.msg} at {where}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: nested too deeply") from None


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file to keep, each flushed to the disk."""
    described = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if not path.is_file() or name.parts[0] == CHECKPOINTS or name.parts == (ATTEMPT,):
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        described[name.as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return described


def compare_files(directory: Path, described: Mapping[str, Mapping]) -> str | None:
    """The first difference between the files and their description."""
    for name, expected in described.items():
        try:
            with (directory / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected["bytes"]:
                    return f"{name} has {size} bytes, not {expected['bytes']}"
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} has changed since it was written (SHA-256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def stat_files(directory: Path, described: Mapping[str, Mapping]) -> tuple:
    """What changes when a file is written to, for every file; ``None`` for a missing one."""
    stats: list[tuple | None] = []
    for name in described:
        try:
            stat = (directory / name).stat()
            stats.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        except OSError:
            stats.append(None)
    return tuple(stats)


def sealed(manifest: Mapping[str, Any], name: str = MANIFEST) -> dict[str, Any]:
    """A manifest in JSON's own types, with a hash of its own; ``name``: for messages."""
    manifest = plain(manifest, name)
    return manifest | {OWN_HASH: _own_hash(manifest)}


def read_manifest(directory: Path) -> tuple[dict, str | None]:
    """The manifest of an artifact, or an empty one and what is wrong with it."""
    try:
        manifest = read_json(directory / MANIFEST)
        named = (manifest["stage"], manifest["fingerprint"])
        if named != (directory.parent.name, directory.name):
            return {}, f"{MANIFEST} describes {'/'.join(named)}"
        if manifest[OWN_HASH] != _own_hash(manifest):
            return {}, f"{MANIFEST} has changed since it was written (SHA-256 differs)"
        datetime.fromisoformat(manifest["created"])
        whole = (
            isinstance(manifest["label"], str)
            and isinstance(manifest["summary"], dict)
            and all(map(_is_inside, manifest["files"]))
            and all(isinstance(file["bytes"], int) for file in manifest["files"].values())
        )
        if whole:
            return manifest, None
    except (UserError, OSError) as error:
        return {}, str(error)
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    return {}, f"{MANIFEST} is not a manifest"


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that a manifest says, but for this hash."""
    content = {key: value for key, value in manifest.items() if key != OWN_HASH}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_inside(name: str) -> bool:
    """Whether the name of a file is of one in the artifact's own folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def read_attempt(directory: Path) -> dict[str, Any]:
    """The record of a build in progress: seconds spent, label. Empty where there is none."""
    try:
        attempt = read_json(directory / ATTEMPT)
        return {"seconds": float(attempt["seconds"]), "label": str(attempt["label"])}
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return {}


def library_versions() -> dict[str, str | None]:
    """{library that results depend on: its version}; None where it is not installed."""
    versions: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return versions
