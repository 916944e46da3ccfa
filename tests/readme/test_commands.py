"""The README's other commands run: stages, ranks, Python, lm-eval."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from helpers.readme import COMMANDS, FENCES, ROOT, STAGES, runs, shrunk
from torch.distributed.run import parse_args

import steerlora.__main__
from steerlora import evaluation
from steerlora.__main__ import main
from steerlora.methods.saving import trained_under


@pytest.mark.parametrize("command", STAGES)
def test_it_runs(command, text_folder, root, pretrained, capsys):
    assert runs(command, text_folder, root, pretrained)
    assert "error:" not in capsys.readouterr().err


def adapter_of(root: Path, pretrained: Path) -> Path:
    """An adapter with SAE routing that was trained, intact, on the model at ``pretrained``."""
    base = json.loads((pretrained.parent / "base.json").read_text())["fingerprint"]
    for folder in (root / "adapter_training").glob("*/adapter"):
        config = json.loads((folder / "adapter_config.json").read_text())
        own = config["saes"] and config["base_fingerprint"] == base
        if own and trained_under(folder) == "none":
            return folder
    raise AssertionError("no adapter of this base")


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


def test_the_python_of_the_readme_runs(root, pretrained):
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


def test_the_python_door_of_the_readme_opens(root, pretrained, monkeypatch):
    (code,) = [block for _, block in FENCES if "steerlora.run(" in block]
    door = steerlora.run

    def shrunk_door(*overrides: str):
        return door(*shrunk(shlex.join(["steerlora", *overrides]), root, root, pretrained))

    monkeypatch.setattr(steerlora, "run", shrunk_door)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["results"].frame()) == 1


def test_the_lm_eval_command_runs(root, pretrained, start):
    main(shrunk("steerlora stage=adapter_training", root, root, pretrained))
    (command,) = [c for c in COMMANDS if c.startswith("python -m steerlora.evaluation")]
    adapter = adapter_of(root, pretrained)
    domains = next(p.parent for p in (root / "domains").glob("*/world.json"))
    command = command.replace("pretrained=BASE", f"pretrained={pretrained}")
    command = command.replace("adapter=ADAPTER", f"adapter={adapter}")
    command = command.replace('"DOMAINS"', f'"{domains}"')
    words = [*shlex.split(command)[3:], "--limit", "2", "--device", "cpu"]
    ran = start(*words, script=Path(evaluation.__file__).with_name("__main__.py")).ends_well()
    assert "micro_law" in ran.out


def test_no_command_leaves_folders_behind():
    for name in ("multirun", "lightning_logs"):
        assert not (ROOT / name).exists()
