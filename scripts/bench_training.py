"""A configuration's adapter training beside PEFT LoRA on the same layers, at the base's true shape.

    python scripts/bench_training.py model=qwen3_4b trainer=gpu trainer.max_length=2048
    python scripts/bench_training.py --write results/gpu/qwen3_4b model=qwen3_4b trainer=zero3

Overrides are those of ``steerlora stage=adapter_training``; no weights and no text are needed: the
base is a Qwen3 of the configured shape with random weights, rows are full of random tokens. Both
train through the project's own loop under the same trainer, each in a process of its own, in turn,
``--rounds`` times. PEFT's rank is the total rank of our specialists. The plan's peak is that of
``stage=plan``, which counts the probe of routing too; there is none here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from bench_contenders import peft_lora
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Qwen3ForCausalLM

from steerlora.cli import compose
from steerlora.config import Config, InterventionConfig, TrainerConfig
from steerlora.data.batches import ChatBatch
from steerlora.distributed.devices import peak_flops
from steerlora.distributed.shards import elements
from steerlora.distributed.strategies import check_hardware, device_of_rank
from steerlora.engine.progress import SilentProgress
from steerlora.errors import UserError
from steerlora.lm.flops import training_flops_per_token
from steerlora.lm.pretrained import qwen3_config
from steerlora.lm.shapes import model_shape
from steerlora.methods.base import SiteSAE, Sources
from steerlora.methods.module import MethodModule, scheduled_adamw
from steerlora.planning import plan
from steerlora.planning.memory import Memory
from steerlora.planning.work import ADAPTER
from steerlora.stages.method_training import check_shares, open_to_train
from steerlora.training.language import next_token_loss
from steerlora.training.loop import begins_step, ends_step, fit

WARM_UP = 3  # steps that are not counted


def main() -> None:
    options = _options()
    try:
        config = _config(options.overrides)
        check_hardware(config.trainer)
        check_shares(config.trainer)
        planned = plan.make(config).memories[ADAPTER]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    rounds = _rounds(config, options.rounds)
    result = _summary(config, options.overrides, rounds, planned)
    table = _table(result)
    Console().print(table)
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "training.json").write_text(json.dumps(result, indent=2) + "\n")
        with (options.write / "training.txt").open("w") as file:
            Console(file=file, width=120).print(table)


def _rounds(config: Config, count: int) -> list[dict[str, dict]]:
    """What `measure` gives of each contender, round by round."""
    rounds: list[dict[str, dict]] = [{} for _ in range(count)]
    with (
        tempfile.TemporaryDirectory(prefix="steerlora-bench-") as folder,
        Console(stderr=True).status("random weights") as status,
    ):
        _in_a_process_of_its_own(write_base, config, folder)
        for number, found in enumerate(rounds, 1):
            for name in CONTENDERS:
                status.update(f"round {number} of {count}: {name}")
                found[name] = _in_a_process_of_its_own(measure, name, config, folder)
    return rounds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each process")
    parser.add_argument("--write", type=Path, help="folder for training.json and training.txt")
    parser.add_argument("overrides", nargs="+", help="model=qwen3_4b trainer=gpu ...")
    options = parser.parse_args()
    options.overrides.append(f"trainer.max_steps={WARM_UP + options.steps}")
    return options


def _config(overrides: list[str]) -> Config:
    """Every token is labelled and no row is packed; nothing is saved on the way."""
    config = compose.load(["stage=adapter_training", *overrides])
    trainer = replace(config.trainer, packing=False, checkpoint_seconds=1e9)
    return replace(config, trainer=trainer, plan=replace(config.plan, labelled=1.0))


def _in_a_process_of_its_own(work, *arguments):
    """What a process took stays with it, memory above all."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def write_base(config: Config, folder: str) -> None:
    """A Qwen3 of the configured shape, with random weights, as transformers stores it."""
    torch.manual_seed(0)
    with torch.device(device_of_rank(config.trainer.accelerator)):
        Qwen3ForCausalLM._from_config(
            qwen3_config(config.model),
            dtype=torch.bfloat16,
        ).save_pretrained(folder)


class RandomText:
    """Batches of full rows, other ones at every step.

    Args:
        vocabulary: of the base.
        trainer: rows of a batch and their length.
    """

    def __init__(self, vocabulary: int, trainer: TrainerConfig) -> None:
        self.vocabulary, self.shape = vocabulary, (trainer.batch_size, trainer.max_length)

    def __call__(self, step: int) -> ChatBatch:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, self.vocabulary, self.shape, generator=generator)
        owners = torch.zeros(len(ids), dtype=torch.long)
        return ChatBatch(ids, torch.ones_like(ids), ids.clone(), owners, ids.numel())

    def part(self, step: int, index: int, parts: int) -> ChatBatch:
        return self(step).part(index, parts)


class StepTimes(Callback):
    """Seconds of every whole step, all its parts, with the device waited for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if begins_step(trainer, batch_idx):
            self._began = _now(module.device)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if ends_step(trainer, batch_idx):
            self.seconds.append(_now(module.device) - self._began)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeftModule(L.LightningModule):
    """PEFT LoRA on the adapted layers, at our total rank."""

    strict_loading = False

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config
        method = config.method
        layers = range(min(method.sites), config.model.layers)
        self.adapted = peft_lora(model, method.total_rank, layers, method.target_modules)

    def training_step(self, batch: ChatBatch, index: int) -> torch.Tensor:
        return next_token_loss(self.model, batch)

    def flops_per_token(self, batch: ChatBatch) -> float:
        return training_flops_per_token(
            model_shape(self.config.model),
            adapter_parameters=sum(elements(p) for p in trained(self)),
            first_adapted_layer=min(self.config.method.sites),
            sequence=self.config.trainer.max_length,
        )

    def configure_optimizers(self):
        trainer = self.config.trainer
        return scheduled_adamw(trained(self), trainer, trainer.max_steps)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def ours(model: nn.Module, config: Config) -> L.LightningModule:
    """The configured adapter, with untrained SAEs: they cost what trained ones do."""
    saes = {
        site: replace(config.sae, seed=site).build(config.model.width)
        for site in config.method.sites
        if config.method.reads_features
    }
    sources = Sources(saes={site: SiteSAE(sae) for site, sae in saes.items()})
    learner = config.method.learner(
        config.method.build(model, sources, seed=0),
        model=model,
        domains=config.domains.names,
        pad_token_id=0,
        seed=0,
        intervention=InterventionConfig(),
    )
    return MethodModule(learner, trainer=config.trainer, total_steps=config.trainer.max_steps)


CONTENDERS = {"steerlora": ours, "peft": PeftModule}


def measure(name: str, config: Config, folder: str) -> dict:
    """One training of a contender: seconds of its steps, peak bytes, parameters, FLOPs a token."""
    torch.manual_seed(0)
    model = open_to_train(folder, None, config.trainer)
    module, times = CONTENDERS[name](model, config), StepTimes()
    text = RandomText(config.model.vocabulary, config.trainer)
    parameters, flops = sum(map(elements, trained(module))), module.flops_per_token(text(0))
    with tempfile.TemporaryDirectory() as checkpoints:
        figures = fit(
            module,
            text,
            config.trainer.max_steps,
            trainer=config.trainer,
            checkpoints=Path(checkpoints),
            progress=SilentProgress(),
            description=name,
            callbacks=[times],
        )
    device = torch.device(device_of_rank(config.trainer.accelerator))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "seconds": times.seconds[WARM_UP:],
        "peak_memory_bytes": figures["peak_memory_bytes"],
        "parameters": parameters,
        "flops_per_token": flops,
        "peak_flops": peak_flops(device, config.trainer.precision),
    }


def _summary(
    config: Config, overrides: list[str], rounds: list[dict[str, dict]], planned: Memory
) -> dict:
    tokens = config.trainer.batch_size * config.trainer.max_length
    contenders = {}
    for name in CONTENDERS:
        runs = [each[name] for each in rounds]
        seconds = statistics.median(second for run in runs for second in run["seconds"])
        contenders[name] = {
            "step_seconds": seconds,
            "steps": sum(len(run["seconds"]) for run in runs),
            "tokens_per_second": tokens / seconds,
            "mfu": tokens / seconds * runs[0]["flops_per_token"] / runs[0]["peak_flops"],
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
            "parameters": runs[0]["parameters"],
        }
    ratios = [
        statistics.median(each["steerlora"]["seconds"]) / statistics.median(each["peft"]["seconds"])
        for each in rounds
    ]
    return {
        "device": rounds[0]["peft"]["device"],
        "overrides": overrides,
        "contenders": contenders,
        "steerlora_over_peft": {"median": statistics.median(ratios), "rounds": ratios},
        "planned_peak_bytes": planned.total,
        "planned_moment": planned.moment,
    }


def _table(result: dict) -> Table:
    ratio = result["steerlora_over_peft"]["median"]
    planned = f"planned peak {result['planned_peak_bytes'] / 1e9:.2f} GB {result['planned_moment']}"
    table = Table(
        title=f"{result['device']}: {' '.join(result['overrides'])}",
        caption=f"steerlora takes {ratio:.3f} times PEFT's step; {planned}",
    )
    for column in ("", "ms (median)", "tokens/s", "MFU", "peak, GB", "parameters"):
        table.add_column(column, justify="right")
    for name, figures in result["contenders"].items():
        table.add_row(
            name,
            f"{1000 * figures['step_seconds']:.1f}",
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['mfu']:.3f}",
            f"{figures['peak_memory_bytes'] / 1e9:.2f}",
            f"{figures['parameters']:,}",
        )
    return table


if __name__ == "__main__":
    main()
