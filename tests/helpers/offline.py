"""W&B's offline runs, read back from their files."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of an offline run: protobuf in LevelDB's log format, blocks of 32 KiB."""
    data, position, record = path.read_bytes(), 7, b""  # 7 bytes of W&B's own in front
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@dataclass
class OfflineRun:
    """What the file of one run says."""

    stage: str = ""
    """Its job type."""
    name: str = ""
    group: str = ""
    id: str = ""
    project: str = ""
    entity: str = ""
    sweep: str = ""
    """Id of the sweep that it is of; empty: of none."""
    preempting: bool = False
    """Whether it said that it is being preempted."""
    tags: set[str] = field(default_factory=set)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    """{metric, or its beginning and ``*``: the metric it is drawn over}."""
    used: set[tuple[str, str]] = field(default_factory=set)
    """{(stage, fingerprint)} of the artifacts that it reads."""
    made: set[tuple[str, str]] = field(default_factory=set)
    references: set[str] = field(default_factory=set)
    """Where the artifacts lie."""
    code: int | None = None
    """Exit code."""
    folder: Path = Path()

    def table(self, name: str) -> list[dict[str, Any]]:
        """A table that it logged, a mapping a row."""
        stored = json.loads((self.folder / "files" / self.summary[f"{name}/path"]).read_text())
        return [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]

    def image(self, name: str) -> Path:
        """The file of an image that it logged."""
        return self.folder / "files" / self.summary[f"{name}/path"]


def read_run(path: Path) -> OfflineRun:
    """One run, which has ended; W&B's own process may still be writing its last records."""
    for _ in range(600):
        run = _read(path)
        if run.code is not None:
            return run
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end")


def _read(path: Path) -> OfflineRun:
    run = OfflineRun(folder=path.parent)
    for record in records(path):
        if record.HasField("run"):
            header = record.run
            run.stage, run.name, run.group = header.job_type, header.display_name, header.run_group
            run.id, run.tags = header.run_id, set(header.tags)
            run.project, run.entity, run.sweep = header.project, header.entity, header.sweep_id
            run.config = {item.key: json.loads(item.value_json) for item in header.config.update}
        elif record.HasField("history"):
            row = _items(record.history.item)
            run.history.append(row)
            run.summary |= row
        elif record.HasField("summary"):
            run.summary |= _items(record.summary.update)
        elif record.HasField("metric"):
            metric = record.metric
            run.axes[metric.name or metric.glob_name] = metric.step_metric
        elif record.HasField("artifact"):
            found = record.artifact
            if found.type != "run_table":  # a table that it logged, as W&B stores it
                place = run.used if found.use_after_commit else run.made
                place.add((found.type, found.name.rpartition("-")[2]))
                run.references |= {entry.ref for entry in found.manifest.contents}
        elif record.HasField("preempting"):
            run.preempting = True
        elif record.HasField("exit"):
            run.code = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_runs(folder: Path) -> list[OfflineRun]:
    """Every run under a folder, in the order in which they began."""
    files = sorted(folder.rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime)
    return [read_run(path) for path in files]
