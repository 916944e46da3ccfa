from __future__ import annotations

import errno
import io
import json
import logging
import multiprocessing
import os
import random
import re
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from steerlora.engine import artifacts
from steerlora.engine.artifacts import ArtifactStore, fingerprint
from steerlora.engine.inventory import ArtifactInfo, listing, status_table
from steerlora.engine.machine import built_by, this_machine
from steerlora.engine.manifests import (
    FINGERPRINT_DIGITS,
    LIBRARIES,
    plain,
    read_json,
    read_manifest,
    sealed,
    write_json,
)
from steerlora.errors import UserError

NAME = "0123456789abcdef0123"
RECORD = {"version": 3, "config": {"k": 16}, "inputs": {"base": "f" * 20}, "seed": 7, "label": "L"}


@dataclass(frozen=True)
class Optimizer:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)


class Kind(Enum):
    TEXT = "text"


def two_files(directory: Path) -> dict:
    (directory / "deep").mkdir(exist_ok=True)
    (directory / "a.bin").write_bytes(b"weights" * 100)
    (directory / "deep" / "b.json").write_text('{"loss": 1.5}')
    return {"loss": 1.5}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def build(store: ArtifactStore, builder=two_files):
    return store.build("sae_training", NAME, RECORD, builder)


# ---------------------------------------------------------------- fingerprints and JSON


def test_fingerprint_is_stable():
    config = {"rank": 16, "path": Path("a/b"), "optimizer": Optimizer()}
    inputs = {"sae": "1" * 20, "base": "2" * 20}
    # A literal: a change here makes every stored artifact be built again.
    assert fingerprint("adapter_training", 1, config, inputs) == "7e2407d5e6f9c98213ca"
    reordered = {"optimizer": {"betas": [0.9, 0.999], "lr": 1e-4}, "path": "a/b", "rank": 16}
    same = fingerprint("adapter_training", 1, reordered, dict(reversed(inputs.items())))
    assert same == fingerprint("adapter_training", 1, config, inputs)
    assert len(same) == FINGERPRINT_DIGITS


def test_fingerprint_is_sensitive_to_everything():
    base = ("s", 1, {"lr": 0.1, "names": ["a", "b"]}, {"x": "1"})
    variants = [
        ("t", *base[1:]),
        ("s", 2, *base[2:]),
        ("s", 1, {"lr": float(np.nextafter(0.1, 1)), "names": ["a", "b"]}, {"x": "1"}),
        ("s", 1, {"lr": 0.1, "names": ["b", "a"]}, {"x": "1"}),
        ("s", 1, {"lr": 0.1, "names": ["a", "b"], "more": None}, {"x": "1"}),
        ("s", 1, base[2], {"x": "2"}),
        ("s", 1, base[2], {"y": "1"}),
    ]
    assert len({fingerprint(*arguments) for arguments in [base, *variants]}) == 1 + len(variants)


def test_plain_normalises_and_refuses():
    value = {1: (Path("x"), Kind.TEXT), "set": {"b", "a"}, "np": np.float32(0.5), "row": np.eye(1)}
    assert plain(value) == {"1": ["x", "text"], "set": ["a", "b"], "np": 0.5, "row": [[1.0]]}
    with pytest.raises(UserError, match=r"config\.router\.margin is inf"):
        plain({"router": {"margin": float("inf")}}, "config")
    with pytest.raises(TypeError, match=r"value\.f is a function"):
        plain({"f": lambda: None})


def test_write_json_is_whole_or_nothing(tmp_path: Path):
    path = tmp_path / "scores.json"
    write_json(path, {"score": 0.1 + 0.2, "none": None})
    assert read_json(path) == {"score": 0.1 + 0.2, "none": None}
    with pytest.raises(UserError, match=r"scores\.json\.score is nan"):
        write_json(path, {"score": float("nan")})
    assert read_json(path)["score"] == 0.1 + 0.2
    assert list(tmp_path.iterdir()) == [path]


def test_read_json_names_file_and_place(tmp_path: Path):
    path = tmp_path / "broken.json"
    path.write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(UserError, match=r"broken\.json is not valid JSON: .* at line 2, column 6"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 at byte 0"):
        read_json(path)
    with pytest.raises(UserError, match=r"gone\.json is missing"):
        read_json(tmp_path / "gone.json")


# ---------------------------------------------------------------- building and finding


def test_build_writes_a_full_manifest_and_is_reused(store: ArtifactStore):
    artifact = build(store)
    assert artifact.path == store.root / "sae_training" / NAME
    assert artifact.json("deep/b.json") == {"loss": 1.5}
    assert (artifact / "a.bin").stat().st_size == 700
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest == artifact.manifest
    assert RECORD.items() <= manifest.items()
    assert manifest["summary"] == {"loss": 1.5}
    assert sorted(manifest["files"]) == ["a.bin", "deep/b.json"]
    assert manifest["files"]["a.bin"]["bytes"] == 700
    assert {"torch", "lm-eval", "steerlora"} < set(manifest["library_versions"]) == set(LIBRARIES)
    assert built_by(manifest) == this_machine()
    assert sorted(path.name for path in artifact.path.iterdir()) == [
        "a.bin",
        "deep",
        "manifest.json",
    ]

    def unwanted(_: Path) -> None:
        raise AssertionError("built twice")

    assert build(store, unwanted).manifest == manifest
    assert ArtifactStore(store.root).find("sae_training", NAME) == artifact


def truncate(artifact: Path) -> None:
    with (artifact / "a.bin").open("r+b") as file:
        file.truncate(10)


def edit(artifact: Path) -> None:
    """The same size, and the old modification time put back."""
    before = (artifact / "a.bin").stat()
    (artifact / "a.bin").write_bytes(b"Weights" * 100)
    os.utime(artifact / "a.bin", ns=(before.st_atime_ns, before.st_mtime_ns))


def forge(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "0" * 20}))


DAMAGE = {
    "truncated": (truncate, r"a\.bin has 10 bytes, not 700"),
    "edited": (edit, r"a\.bin has changed"),
    "missing": (lambda path: (path / "deep/b.json").unlink(), r"deep/b\.json is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest\.json is missing"),
    "half manifest": (
        lambda path: (path / "manifest.json").write_text('{"stage": "sae'),
        r"manifest\.json is not valid JSON",
    ),
    "empty manifest": (
        lambda path: (path / "manifest.json").write_text("{}"),
        r"manifest\.json is not a manifest",
    ),
    "another's manifest": (forge, r"manifest\.json describes sae_training/0000"),
}


@pytest.mark.parametrize("fresh", [True, False], ids=["other process", "same process"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_named_and_rebuilt(store: ArtifactStore, caplog, kind: str, fresh: bool):
    damage, pattern = DAMAGE[kind]
    artifact = build(store)
    assert store.find("sae_training", NAME) is not None
    damage(artifact.path)
    if fresh:
        store = ArtifactStore(store.root)
    with caplog.at_level(logging.WARNING):
        assert store.find("sae_training", NAME) is None
    (record,) = caplog.records
    assert f"sae_training/{NAME} is damaged" in record.getMessage()
    assert re.search(pattern, record.getMessage())
    assert record.levelno == logging.WARNING
    caplog.clear()
    assert not artifact.path.exists()
    assert artifact.path.with_name(f"{NAME}.corrupt").exists()
    assert (build(store) / "a.bin").read_bytes() == b"weights" * 100
    assert ArtifactStore(store.root).find("sae_training", NAME) is not None
    assert not caplog.records


def test_a_changed_bit_of_any_byte_of_a_manifest_counts(store: ArtifactStore):
    """Or the manifest says the same all the same, as where white space is another.

    Of each byte one bit is drawn; over all bytes each of the eight is drawn often.
    """
    artifact = build(store)
    path = artifact / "manifest.json"
    intact = path.read_bytes()
    found, draw = 0, random.Random(0)
    for place in range(len(intact)):
        changed = bytearray(intact)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        manifest, problem = read_manifest(artifact.path)
        assert problem is not None or manifest == artifact.manifest
        found += problem is not None
    assert found > 2 / 3 * len(intact)
    path.write_bytes(intact)
    assert store.find("sae_training", NAME) == artifact


@pytest.mark.parametrize(
    "changes",
    [
        {"label": None},
        {"label": ["a"]},
        {"created": "yesterday"},
        {"created": None},
        {"summary": []},
        {"files": []},
        {"files": {"../../a.bin": {"bytes": 1, "sha256": ""}}},
        {"files": {"/etc/hostname": {"bytes": 1, "sha256": ""}}},
        {"files": {"a.bin": {"bytes": "1"}}},
        {"files": {"a.bin": None}},
        {"stage": None},
        {"stage": "\x1b[31m"},
    ],
    ids=str,
)
def test_a_manifest_of_another_form_is_none(store: ArtifactStore, changes, caplog):
    """With a hash that fits: its writer may have been anyone."""
    artifact = build(store)
    write_json(artifact / "manifest.json", sealed(artifact.manifest | changes))
    assert read_manifest(artifact.path)[1] is not None
    (info,) = listing(store.root)
    assert info.state == "corrupt"
    shown([info])
    assert store.find("sae_training", NAME) is None
    (record,) = caplog.records
    assert record.getMessage().isprintable()


def test_a_folder_in_place_of_a_manifest_is_damage(store: ArtifactStore):
    artifact = build(store)
    (artifact / "manifest.json").unlink()
    (artifact / "manifest.json").mkdir()
    assert store.find("sae_training", NAME) is None


def test_files_are_hashed_once(store: ArtifactStore, monkeypatch):
    build(store)
    hashed = []
    real = artifacts.compare_files
    monkeypatch.setattr(
        artifacts, "compare_files", lambda *args: hashed.append(args) or real(*args)
    )
    assert store.find("sae_training", NAME)
    assert not hashed  # it has just been written
    other = ArtifactStore(store.root)
    assert other.find("sae_training", NAME)
    assert other.find("sae_training", NAME)
    assert len(hashed) == 1
    (other.directory("sae_training", NAME) / "a.bin").touch()
    assert other.find("sae_training", NAME)
    assert len(hashed) == 2


# ---------------------------------------------------------------- interruption and a full disk


def test_interruption_leaves_a_partial_that_resumes(store: ArtifactStore):
    partial = store.root / "sae_training" / f"{NAME}.partial"

    def train(directory: Path, stop: bool) -> dict:
        checkpoint = directory / "checkpoints" / "last.json"
        checkpoint.parent.mkdir(exist_ok=True)
        first = read_json(checkpoint)["step"] if checkpoint.exists() else 0
        for step in range(first, 10):
            write_json(checkpoint, {"step": step})
            time.sleep(0.01)
            if stop and step == 5:
                raise KeyboardInterrupt
        (directory / "weights").write_text("trained")
        return {"first": first}

    with pytest.raises(KeyboardInterrupt):
        build(store, lambda directory: train(directory, stop=True))
    assert store.find("sae_training", NAME) is None
    assert (partial / "checkpoints/last.json").exists()
    spent = read_json(partial / ".attempt.json")["seconds"]
    assert spent >= 0.05
    # Not even with a manifest in it: it was not renamed.
    (partial / "manifest.json").write_text("{}")
    (partial / ".weights.1.tmp").write_text("half of a file")
    assert store.find("sae_training", NAME) is None

    artifact = build(store, lambda directory: train(directory, stop=False))
    assert artifact.manifest["summary"] == {"first": 5}
    assert artifact.manifest["wall_seconds"] >= spent + 0.05
    assert list(artifact.manifest["files"]) == ["weights"]
    assert not partial.exists()
    assert not (artifact / "checkpoints").exists()


def full_disk(directory: Path) -> None:
    (directory / "half").write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / "half"))


def wrapped_full_disk(directory: Path) -> None:
    try:
        full_disk(directory)
    except OSError as error:
        raise RuntimeError("could not save") from error


def full_disk_in_words(directory: Path) -> None:
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("builder", [full_disk, wrapped_full_disk, full_disk_in_words])
def test_full_disk_while_building(store: ArtifactStore, builder):
    with pytest.raises(UserError, match=r"no space left.*artifacts\.root=DIR") as caught:
        build(store, builder)
    assert f"sae_training/{NAME}" in str(caught.value)
    assert str(store.root) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert store.find("sae_training", NAME) is None
    assert build(store).manifest["summary"] == {"loss": 1.5}


def test_full_disk_while_finishing_keeps_the_checkpoints(store: ArtifactStore, monkeypatch):
    def refuse(path: Path, value: object) -> None:
        if path.name == "manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, value)

    def builder(directory: Path) -> None:
        (directory / "checkpoints").mkdir(exist_ok=True)
        (directory / "checkpoints" / "last").touch()
        two_files(directory)

    monkeypatch.setattr(artifacts, "write_json", refuse)
    with pytest.raises(UserError, match="no space left"):
        build(store, builder)
    monkeypatch.undo()
    assert store.find("sae_training", NAME) is None
    assert (store.root / "sae_training" / f"{NAME}.partial" / "checkpoints" / "last").exists()
    assert not (build(store, builder) / "checkpoints").exists()


def test_other_errors_of_a_builder_pass_unchanged(store: ArtifactStore):
    def fail(_: Path) -> None:
        raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError, match="by zero"):
        build(store, fail)
    with pytest.raises(UserError, match=r"summary\.loss is nan"):
        build(store, lambda _: {"loss": float("nan")})
    assert store.find("sae_training", NAME) is None


def test_a_root_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match=r"cannot write .*artifacts\.root=DIR"):
        build(ArtifactStore(tmp_path / "file"))


# ---------------------------------------------------------------- concurrency


def build_and_count(root: Path, barrier, results) -> None:
    def builder(directory: Path) -> None:
        with (root / "counter").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1.2)  # longer than the waiting process stays silent
        two_files(directory)

    messages: list[str] = []
    barrier.wait()
    artifact = ArtifactStore(root).build("sae_training", NAME, RECORD, builder, messages.append)
    results.put((artifact.manifest, messages))


def test_two_processes_build_once(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=build_and_count, args=(tmp_path, barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    answers = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert len((tmp_path / "counter").read_text().split()) == 1
    assert answers[0][0] == answers[1][0]
    waited = [message for _, messages in answers for message in messages]
    assert waited == [f"waiting for another process that builds sae_training/{NAME}"]


# ---------------------------------------------------------------- status


def test_listing_and_table(store: ArtifactStore):
    assert listing(store.root) == []
    build(store)
    damaged = store.build("base", "a" * 20, {"label": "micro_m"}, two_files)
    truncate(damaged.path)
    with pytest.raises(KeyboardInterrupt):
        store.build("adapter_training", "b" * 20, {"label": "lora [seed 1]"}, interrupted)
    (store.root / "base" / "notes").mkdir()  # not ours
    infos = listing(store.root)
    assert [(info.stage, info.state, info.label) for info in infos] == [
        ("adapter_training", "partial", "lora [seed 1]"),
        ("base", "corrupt", "micro_m"),
        ("sae_training", "complete", "L"),
    ]
    size = sum(path.stat().st_size for path in (store.root / "sae_training").glob("*/**/*.*"))
    assert infos[2].bytes == size > 700
    assert 0 <= infos[2].age.total_seconds() < 60

    text = shown(infos)
    for expected in ("sae_training", NAME, "complete", "partial", "corrupt", "lora [seed 1]", "kB"):
        assert expected in text


def shown(infos: list[ArtifactInfo]) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(status_table(infos))
    return console.file.getvalue()


def test_the_listing_says_what_another_machine_built(store: ArtifactStore):
    build(store)
    text = shown(listing(store.root))
    assert "this" in text
    assert "another machine" not in text

    def elsewhere(stage: str, machine: dict | None) -> None:
        built = store.build(stage, "a" * 20, {"label": ""}, two_files)
        write_json(built / "manifest.json", sealed(built.manifest | {"machine": machine}))

    here = plain(this_machine())
    elsewhere("base", here | {"processor": "EPYC [9]"})
    elsewhere("evaluate", here | {"threads": 77})  # not what tells machines apart
    elsewhere("domains", None)
    infos = listing(store.root)
    assert {info.state for info in infos} == {"complete"}
    text = shown(infos)
    other = f"{here['instructions']}, EPYC [9]"
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert rows["base"].rstrip("│ ").endswith(other)
    assert rows["domains"].rstrip("│ ").endswith("unknown")
    assert rows["evaluate"].rstrip("│ ").endswith("this")
    told = " ".join(text.split("┘")[1].split())
    assert told == (
        f"4 artifacts; 1 was built on another machine ({other}): "
        "its numbers may differ from what this one would give"
    )
    elsewhere("activations", here | {"instructions": "SVE"})
    told = " ".join(shown(listing(store.root)).split("┘")[1].split())
    assert f"2 were built on another machine (SVE, {here['processor']}; {other}): their" in told


def interrupted(directory: Path) -> None:
    raise KeyboardInterrupt
