"""Every command of the README runs; at sizes that teach nothing and take seconds."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args
from transformers import AutoConfig

import steerlora.__main__
from steerlora.__main__ import main
from steerlora.lm.pretrained import shape_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
"""(language, text) of every block of code."""
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in FENCES
    if language == "bash"
    for line in block.splitlines()
    if line
]

TINY = {
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.head_width": 16,
    "model.ffn_width": 64,
    "model.vocabulary": 300,
    "model.steps": 2,
    "model.batch_size": 8,
    "method.sites": "[1]",
    "sae.latents": 64,
    "sae.max_tokens": 2000,
    "sae.steps": 2,
    "sae.batch_size": 128,
    "trainer.max_steps": 2,
    "trainer.batch_size": 8,
    "trainer.max_length": 64,
    "order.steps_per_domain": 1,
    "domains.train_items": 16,
    "domains.pretrain_items": 100,
    "domains.evaluation_items": 8,
    "evaluation.limit": 4,
    "evaluation.max_length": 64,
    "evaluation.generation_items": 1,
    "logger": "none",
    "study.workers": 1,
    "study.seeds": "[0]",
    "study.scale_seeds": "[0]",
    "study.orders": "[broad_first]",
}


RUN_BY = ("steerlora ", "make ", "torchrun ", "sbatch ", "python scripts/", "python -m steerlora")
"""Beginnings of commands; a test below, or one of tests/scripts, runs each of them."""


def test_every_command_is_of_a_kind_that_a_test_runs():
    assert COMMANDS
    assert [command for command in COMMANDS if not command.startswith(RUN_BY)] == []


def tree_of(folder: Path) -> list[str]:
    """Folders that hold code or settings, as git has them, by path from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=folder,
        capture_output=True,
        text=True,
    ).stdout.split()
    found = {parent.as_posix() for name in listed for parent in Path(name).parents}
    deep = {path for path in found if path.startswith("steerlora/")}
    return sorted((found & {path.split("/")[0] for path in found}) - {".", ".ci"} | deep)


def test_the_tree_is_the_tree():
    if not (ROOT / ".git").exists():
        pytest.skip("the tree is compared with what git lists: there is no checkout here")
    (block,) = [block for language, block in FENCES if not language]
    paths, above = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, *said = line.split(maxsplit=1)
        assert said, f"{name} is not described"
        above[depth:] = [name.rstrip("/")]
        paths.append("/".join(above))
    assert sorted(paths) == tree_of(ROOT)


EXTENSION = ROOT / "tests/extension"
SHOWN = sorted(
    path.relative_to(EXTENSION).as_posix()
    for path in (*EXTENSION.glob("*.py"), *EXTENSION.rglob("*.yaml"))
    if not path.name.startswith("test_")
)


@pytest.mark.parametrize("name", SHOWN)
def test_adding_to_it_shows_what_the_tests_run(name):
    language = {"py": "python", "yaml": "yaml"}[name.rpartition(".")[2]]
    assert (language, (EXTENSION / name).read_text()) in FENCES


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for domain in ("instruction", "math", "code", "medicine", "law"):
        rows = [
            {"prompt": f"{domain} question {number} about {number * 7}", "response": f"{number}"}
            for number in range(60)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{domain}_train.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


def shrunk(command: str, text_folder: Path, root: Path, pretrained: Path) -> list[str]:
    """The command's arguments with everything tiny, and hub ids replaced by a local model."""
    words = shlex.split(command)[1:]
    words = [word.replace("domains.dir=data", f"domains.dir={text_folder}") for word in words]
    if "stage=plan" in words:  # it needs neither the model nor the GPU
        return words
    words = ["trainer=cpu" if word == "trainer=gpu" else word for word in words]
    # Here there may be no SLURM: its own tests run sweeps under one where there is.
    words = [word.replace("submitit_slurm", "submitit_local") for word in words]
    words = ["evaluation=micro" if word == "evaluation=paper" else word for word in words]
    words = ["domains=micro" if word == "domains=paper" else word for word in words]
    tiny = {**TINY, "artifacts.root": root, "results.dir": root / "results"}
    if any(word.startswith("model=qwen3") for word in words):
        shape = shape_of(AutoConfig.from_pretrained(pretrained))
        tiny |= {f"model.{key}": value for key, value in shape.items()}
        tiny |= {"model.path": pretrained, "model.thinking": "null", "sae.path": "null"}
    if "experiment=continual" in words:
        tiny |= {"study.sequential_methods": "[lora,sc_lora_context]"}
    if "experiment=calibration" in words:
        tiny |= {"study.seeds": "[0,1,2]", "study.scale_seeds": "[0,1,2]", "study.calibrate": "[2]"}
        tiny |= {"study.models": "[micro_m]", "study.interventions": "[shuffle]"}
    if "experiment=micro_full" in words:
        tiny |= {f"study.{those}methods": "[lora,sc_lora]" for those in ("", "scale_")}
        tiny |= {"study.sequential_methods": "[lora,sc_lora]"}
        tiny |= {"study.interventions": "[shuffle]", "study.retrained": "[shuffle]"}
        tiny |= {"study.doses": "[0.5]"}
    if "experiment=smoke" in words:
        tiny = {"artifacts.root": root, "results.dir": root / "results", "logger": "none"}
    if "--cfg" in words:
        tiny = {}
    return [*words, *(f"{key}={value}" for key, value in tiny.items())]


@pytest.fixture(scope="module")
def pretrained(root: Path) -> Path:
    """A base model on disk, as a user would have one."""
    main(shrunk("steerlora stage=base", root, root, root))
    return next((root / "base").glob("*/model"))


def adapter_of(root: Path, pretrained: Path) -> Path:
    """An adapter with SAE routing that was trained on the model at ``pretrained``."""
    base = json.loads((pretrained.parent / "base.json").read_text())["fingerprint"]
    for folder in (root / "adapter_training").glob("*/adapter"):
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["saes"] and config["base_fingerprint"] == base:
            return folder
    raise AssertionError("no adapter of this base")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("steerlora")])
def test_steerlora_commands_run(command, text_folder, root, pretrained, capsys):
    code = 0
    try:
        main(shrunk(command, text_folder, root, pretrained))
    except SystemExit as stopped:  # a sweep always says how it ended
        code = stopped.code
    assert not code
    assert "error:" not in capsys.readouterr().err


def test_the_download_finds_what_there_is_to_fetch():
    (command,) = [c for c in COMMANDS if "download.py" in c]
    words = [sys.executable, *shlex.split(command)[1:], "--dry-run"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for thing in ("Qwen/Qwen3-8B", "Qwen/SAE-Res", "openai/gsm8k", "cais/mmlu", "punkt_tab"):
        assert thing in said.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("torchrun")])
def test_torchrun_commands_run(command, text_folder, root, pretrained, start):
    """Two ranks in place of the many, and local files; tests/ranks/ run torchrun itself."""
    launcher, asked = command.split(" -m steerlora ")
    options = parse_args([*shlex.split(launcher)[1:], "-m", "steerlora"])
    machines = int(options.nnodes.split(":")[0])
    assert int(options.nproc_per_node) > 1
    assert (options.rdzv_endpoint != "") == (machines > 1)
    asked = shrunk(f"steerlora {asked}", text_folder, root, pretrained)
    hardware = ["trainer.accelerator=cpu", "trainer.precision=32-true", f"seed={machines}"]
    before = set((root / "adapter_training").glob("*/adapter"))
    script = Path(steerlora.__main__.__file__)
    for rank in start.ranks(*asked, *hardware, script=script, machines=machines > 1):
        rank.ends_well()
    assert len({*(root / "adapter_training").glob("*/adapter")} - before) == 1


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_commands_exist(command):
    said = subprocess.run(
        ["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr


def test_the_python_of_the_readme_runs(root, pretrained, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main(shrunk("steerlora stage=adapter_training", root, root, pretrained))
    (code,) = [block for _, block in FENCES if "load_adapter" in block]
    routed = str(adapter_of(root, pretrained))
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    inputs = tokenizer("law", return_tensors="pt", add_special_tokens=False)
    names = {
        "model": AutoModelForCausalLM.from_pretrained(pretrained),
        "inputs": {"input_ids": inputs["input_ids"], "max_new_tokens": 2},
    }
    code = code.replace("artifacts/adapter_training/<fingerprint>/adapter", routed)
    exec(compile(code, "README.md", "exec"), names)
    assert names["adapter"].routing()


def test_the_lm_eval_command_runs(root, pretrained):
    main(shrunk("steerlora stage=adapter_training", root, root, pretrained))
    (command,) = [c for c in COMMANDS if c.startswith("python -m steerlora.evaluation")]
    adapter = adapter_of(root, pretrained)
    domains = next(p.parent for p in (root / "domains").glob("*/world.json"))
    command = command.replace("pretrained=BASE", f"pretrained={pretrained}")
    command = command.replace("adapter=ADAPTER", f"adapter={adapter}")
    command = command.replace('"DOMAINS"', f'"{domains}"')
    words = [sys.executable, *shlex.split(command)[1:], "--limit", "2", "--device", "cpu"]
    said = subprocess.run(words, cwd=root, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    assert "micro_law" in said.stdout


def test_no_command_leaves_folders_behind():
    for name in ("multirun", "lightning_logs"):
        assert not (ROOT / name).exists()
