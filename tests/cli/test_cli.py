"""The command line: one line and exit code 2 for a mistake, 130 for Ctrl-C, sweeps, help."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

import steerlora.__main__ as command
from steerlora.cli import compose
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.stages import adapter_training, method_training

TINY = (
    "model=micro_xs",
    "model.steps=2",
    "model.batch_size=4",
    "domains.train_items=10",
    "domains.pretrain_items=100",
    "domains.evaluation_items=4",
    "sae.max_tokens=400",
    "sae.steps=2",
    "sae.batch_size=32",
    "trainer.max_steps=2",
    "trainer.batch_size=2",
    "method.rank=2",
    "evaluation.limit=1",
    "order.steps_per_domain=1",
    "logger=none",
)


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The line that names the user's mistake; fails where there is more than one line."""
        assert self.code == 2, self
        assert "Traceback" not in self.out + self.err
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line


@pytest.fixture
def steerlora(tmp_path, monkeypatch, capfd) -> Callable[..., Outcome]:
    """``steerlora("stage=base", ...)`` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["steerlora"])
    # pytest is no terminal: a table must not be folded into its default width.
    monkeypatch.setattr(command, "console", Console(soft_wrap=True, width=300))

    def call(*arguments: str) -> Outcome:
        capfd.readouterr()
        try:
            command.main(arguments)
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """An artifact root with a tiny base, SAE and adapters."""
    root = tmp_path_factory.mktemp("trained")
    configs = [compose.load([*TINY, f"method={name}"]) for name in ("lora", "sc_lora")]
    run([adapter_training.step(config) for config in configs], ArtifactStore(root))
    return root


@pytest.fixture
def root(trained, tmp_path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "artifacts"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "nothing to do: give experiment=micro"),
        ("method=lora", "nothing to do"),
        ("stage=adapter_trainig", "did you mean 'adapter_training'"),
        ("stage=base method=lorra", "method=lorra: did you mean 'lora'"),
        ("stage=base method.rnk=4", "no such key: method.rnk; did you mean 'method.rank'"),
        ("stage=base +foo=1", "no such key: foo"),
        ("stage=base method.rank=-1", "method.rank=-1: must be a whole number from 1"),
        ("stage=base seed=x", "seed=x: must be a whole number"),
        ("stage=base sae.k=99999", "is more than sae.latents"),
        ("stage=base method.sites=[9]", "has layers 0 to 3"),
        ("stage=base trainer=null", "it cannot be null"),
        ("stage=base method.rank=2,4", "To sweep over it"),
        ("stage=base --bogus", "--bogus; steerlora --help"),
        ("stage=base --resolve", "--resolve goes with --cfg"),
        ("metod=lora --cfg job", "did you mean 'method'"),
        (
            "stage=base adapter=lora",
            "no such key: adapter; the group is method now: method=<option>",
        ),
        ("stage=base control.sites=[1]", "or 'method.sites'?"),
        ("stage=base continual.memory=true", "no such key: continual.memory"),
        ("stage=base plugins=[no_such_plugin]", "plugins: no_such_plugin cannot be imported"),
        ("stage=report", "stage=report needs what it reports"),
        (
            "stage=causal_ablation method=lora",
            "a control signal of SAE features, and method=lora has none",
        ),
        (
            "stage=evaluate method=lora intervention=shuffle",
            "a control signal of SAE features, and method=lora has none",
        ),
        ("stage=evaluate intervention.name=shufle", "did you mean 'shuffle'"),
        ("stage=causal_ablation study.interventions=[invrt]", "did you mean 'invert'"),
        ("stage=base model.path=/no/such/model", "model.path=/no/such/model cannot be loaded"),
        ("experiment=text", "domains.dir=<folder"),
        ("experiment=text domains.dir=/no/such", "domains.dir=/no/such: there is no such folder"),
        ("stage=base artifacts.root=/dev/null/there", "artifacts.root=DIR"),
        ("stage=domains artifacts.root=/proc/there", "artifacts.root=DIR"),
        ("stage=base stage=evaluate", "give one stage"),
        ("stage=base model=3", "a config group is one of its options"),
        ("stage=base method.sites=[[1]]", "method.sites[0]=[1]: must be a whole number"),
        ("stage=base --config-name=x", "--config-name: there is one configuration"),
        ("-m stage=base seed=range(0)", "the sweep has no job"),
        ("stage=base trainer.accelerator=mps", "trainer.accelerator=mps: this machine has no"),
        ("stage=evaluate evaluation.shots.gsm8k=2", "evaluation.shots.gsm8k: this task does not"),
        ("stage=evaluate evaluation.shots.micro_law=2", "the domains' own tasks have no examples"),
        (
            'stage=evaluate evaluation.metrics.gsm8k="a,b"',
            "evaluation.metrics.gsm8k: this task does",
        ),
        ("stage=evaluate evaluation.tasks=[micro_lw]", "task=micro_lw: did you mean 'micro_law'"),
        ("stage=evaluate evaluation.include_path=no/such", "there is no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(steerlora, arguments, says):
    assert says in steerlora(*arguments.split()).mistake


def test_a_users_text_is_no_markup(steerlora):
    planned = steerlora("stage=plan", "model=micro_xs", 'model.name="[/x]"')
    assert planned.code == 0, planned
    assert "base [/x]" in planned.out
    swept = steerlora("-m", "stage=status", 'study.name="[/x]","[bold]"', "logger=none")
    assert swept.code == 0, swept
    assert "[/x]" in swept.out
    assert "[bold]" in swept.out


def test_a_mistake_leaves_nothing_behind(steerlora, tmp_path):
    steerlora("stage=base", "method.rank=-1")
    steerlora("-m", "stage=base", "method.rank=2,-1")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_answered_without_importing_torch():
    code = (
        "import sys; from steerlora.__main__ import main\n"
        "try: main(['stage=bse'])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "error: stage=bse: did you mean 'base'?\n"


def test_help_lists_the_groups(steerlora):
    for flag in ("--help", "-h"):
        ended = steerlora(flag)
        assert (ended.code, ended.err) == (0, "")
        assert "steerlora experiment=smoke" in ended.out
        assert "  method: any_ssr, base, epi, inf_lora, lora" in ended.out
        assert "_schema" not in ended.out


def test_the_whole_configuration_is_shown(steerlora, tmp_path):
    ended = steerlora("--cfg", "job", "--resolve", "experiment=smoke", "method.rank=3")
    assert (ended.code, ended.err) == (0, "")
    from omegaconf import OmegaConf

    shown = OmegaConf.create(ended.out)
    assert (shown.method.rank, shown.study.name, shown.results.dir) == (
        3,
        "smoke",
        "results/smoke",
    )
    assert "${" not in ended.out
    # Even one that could not run yet can be looked at.
    assert "dir: null" in steerlora("experiment=text", "--cfg", "job").out
    assert list(tmp_path.iterdir()) == []


ROW = json.dumps({"prompt": "what is two and two ?", "response": "four"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "math_train.jsonl").unlink(), "math_train.jsonl is missing"),
        (
            lambda folder: (folder / "math_train.jsonl").write_text(f'{ROW}\n{{"prompt": "x"}}\n'),
            "math_train.jsonl:2: the row has no 'response'",
        ),
        (
            lambda folder: (folder / "math_train.jsonl").write_text(f"{ROW}\n{ROW}\n{{nope\n"),
            "math_train.jsonl:3: not valid JSON",
        ),
        (
            lambda folder: (folder / "math_train.jsonl").write_text(""),
            "math_train.jsonl has no row",
        ),
    ],
    ids=["missing", "no response", "bad JSON", "empty"],
)
def test_a_spoilt_domains_folder_is_named_by_file_and_line(steerlora, tmp_path, spoil, says):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("law", "math"):
        rows = [json.dumps({"prompt": f"{name} {i} ?", "response": str(i)}) for i in range(30)]
        (folder / f"{name}_train.jsonl").write_text("\n".join(rows) + "\n")
    arguments = ("stage=domains", "domains=text", f"domains.dir={folder}", "domains.broad=law")
    spoil(folder)
    ended = steerlora(*arguments, "domains.names=[law,math]", "artifacts.root=artifacts")
    assert says in ended.mistake
    assert not list(Path("artifacts/domains").glob("*[0-9a-f]"))


def test_the_contract_command_runs_and_leaves_only_artifacts(steerlora, tmp_path):
    ended = steerlora(
        "stage=adapter_training",
        "model=micro_s",
        "domains=micro",
        "method=sc_lora",
        "trainer.max_steps=50",
        "artifacts.root=DIR",
        "logger=none",
        *("model.steps=2", "model.batch_size=4", "trainer.batch_size=2", "trainer.max_steps=2"),
        *("domains.train_items=10", "domains.pretrain_items=100", "domains.evaluation_items=4"),
        *("sae.max_tokens=400", "sae.steps=2", "sae.batch_size=32"),
    )
    assert ended.code == 0, ended
    assert "adapter_training: " in ended.out
    (folder,) = (tmp_path / "DIR/adapter_training").glob("*/manifest.json")
    assert json.loads(folder.read_text())["config"]["trainer"]["max_steps"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["DIR"]
    assert {path.name for path in Path("DIR").iterdir()} == {
        *("domains", "base", "activations", "sae_training", "adapter_training")
    }


def test_a_second_command_builds_nothing_and_status_lists_what_is_there(steerlora, root):
    again = steerlora("stage=adapter_training", *TINY, f"artifacts.root={root}")
    assert again.code == 0
    assert "to build" not in again.out
    assert "adapter_training 0 s (0 built, 1 reused)" in again.out
    listed = steerlora("stage=status", f"artifacts.root={root}")
    assert listed.code == 0
    assert listed.out.count("adapter_training") == 2 * 2  # stage and label
    assert "complete" in listed.out
    assert "corrupt" not in listed.out


def test_a_damaged_artifact_is_named_and_built_again(steerlora, root):
    (weights,) = root.glob("sae_training/*/sae/sae_weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    ended = steerlora("stage=adapter_training", *TINY, f"artifacts.root={root}")
    assert ended.code == 0
    assert "sae/sae_weights.safetensors has" in ended.out + ended.err
    assert re.search(r"sae_training \d+ s \(1 built", ended.out)


def test_a_half_written_artifact_is_never_taken_as_complete(steerlora, root):
    step = adapter_training.step(compose.load(TINY))
    complete = root / step.stage / step.fingerprint
    (complete / "manifest.json").unlink()
    (complete / "adapter/adapter_model.safetensors").unlink()
    ended = steerlora("stage=adapter_training", *TINY, f"artifacts.root={root}")
    assert ended.code == 0
    assert (complete / "manifest.json").is_file()
    assert (complete / "adapter/adapter_model.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_at_its_step(steerlora, root):
    arguments = ("stage=adapter_training", *TINY, f"artifacts.root={root}", "trainer.max_steps=6")
    ended = steerlora(*arguments, "trainer.learning_rate=1e30", "trainer.gradient_clip=1e30")
    line = ended.mistake
    assert "the loss is" in line
    assert "at step" in line
    assert "learning rate" in line
    partial = list(root.glob("adapter_training/*.partial"))
    assert len(partial) == 1
    assert not (partial[0] / "manifest.json").exists()


def test_a_full_disk_is_one_line_and_the_same_command_finishes(steerlora, root, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ("stage=adapter_training", *TINY, f"artifacts.root={root}", "seed=3")
    complete = set(root.glob("adapter_training/*/manifest.json"))
    with monkeypatch.context() as patched:
        patched.setattr(method_training, "save_adapter", full)
        line = steerlora(*arguments).mistake
    assert "no space left on the disk" in line
    assert str(root) in line
    assert set(root.glob("adapter_training/*/manifest.json")) == complete
    assert steerlora(*arguments).code == 0
    assert len(set(root.glob("adapter_training/*/manifest.json")) - complete) == 1


def test_a_report_that_cannot_be_written_is_one_line(steerlora, monkeypatch):
    from steerlora.cli import experiment
    from steerlora.engine.run import RunReport

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("steerlora.engine.run.run", lambda *_, **__: RunReport({}, [], 0.0, 0))
    monkeypatch.setattr(experiment, "plan", lambda *_: experiment.Plan((), (), ()))
    monkeypatch.setattr(experiment, "write_report", full)
    line = steerlora("experiment=smoke", "results.dir=there").mistake
    assert "cannot write the report into there (No space left on device)" in line


def test_a_sweep_runs_every_job_and_says_how_each_ended(steerlora, root, tmp_path):
    shutil.rmtree(root / "adapter_training")
    ended = steerlora(
        "-m", "method=lora,sc_lora", "stage=adapter_training", *TINY, f"artifacts.root={root}"
    )
    assert ended.code == 0, ended
    assert len(list(root.glob("adapter_training/*/manifest.json"))) == 2
    assert ended.out.count("│ done") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["artifacts"]


def test_a_sweep_runs_in_processes_of_joblibs(tmp_path):
    """As ``python -m``, where the job's function must still be one that other processes find."""
    jobs = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "artifacts.root=one,other"]
    ended = subprocess.run(
        [sys.executable, "-m", "steerlora", *jobs, "stage=status", "method=sc_lora_reference"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("0 artifacts") == ended.stdout.count("│ done") == 2


def test_a_sweep_goes_on_after_a_job_that_fails(steerlora, root):
    arguments = ("stage=adapter_training", *TINY, f"artifacts.root={root}", "method=lora")
    ended = steerlora(*arguments, "trainer.learning_rate=1e30,2e-3", "--multirun")
    assert ended.code == 2
    assert "Traceback" not in ended.out + ended.err
    assert "the loss is" in ended.out
    assert ended.out.count("│ done") == 1
    assert ended.out.count("│ failed") == 1


@pytest.mark.parametrize(
    ("swept", "says"),
    [
        ("method=lora,sc_lorra", "did you mean 'sc_lora'"),
        ("method.rank=2,-2", "method.rank=-2: must be a whole number from 1"),
        (
            "stage=adapter_training,causal_ablation method=lora",
            "a control signal of SAE features, and method=lora has none",
        ),
    ],
)
def test_a_sweep_with_one_wrong_job_starts_none(steerlora, tmp_path, swept, says):
    stage = () if "stage=" in swept else ("stage=adapter_training",)
    ended = steerlora("-m", *TINY, *stage, *swept.split(), "artifacts.root=artifacts")
    assert says in ended.mistake
    assert list(tmp_path.iterdir()) == []
