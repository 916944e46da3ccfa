"""Stage ``sequential_forgetting``: one adapter carried through the domains, scored after each."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass

from safetensors.torch import load_file, save_file

from steerlora.artifacts import read_json, write_json
from steerlora.config import (
    AdapterConfig,
    Config,
    ControlConfig,
    DomainsConfig,
    EvaluationConfig,
    LoggerConfig,
    OrderConfig,
    TrainerConfig,
)
from steerlora.data.chat import ChatBatches
from steerlora.evaluation.forgetting import forgetting_metrics
from steerlora.evaluation.harness import Score
from steerlora.evaluation.scoring import Scorer
from steerlora.pipeline import Context, Stage, Step, register
from steerlora.reporting.runs import RunLog
from steerlora.stages import adapter_training, evaluate
from steerlora.stages.common import NOT_IDENTITY, load_base, run_log, training_rows
from steerlora.training.adapter import AdapterModule
from steerlora.training.loop import fit

RESULT = "sequential.json"
UNFINISHED = "finished_domains.json"
WEIGHTS = "adapter_so_far.safetensors"


@dataclass(frozen=True, kw_only=True)
class SequenceSettings:
    """Attributes: sequence: the domains as they come; otherwise as in the configuration."""

    adapter: AdapterConfig
    control: ControlConfig
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    sequence: tuple[str, ...]
    steps_per_domain: int
    order: str
    model: str
    seed: int
    logger: LoggerConfig


def sequence_of(order: OrderConfig, domains: DomainsConfig) -> tuple[str, ...]:
    """The domains in the order that ``order`` says."""
    narrow = [name for name in domains.names if name != domains.broad]
    if order.kind == "broad_first":
        return (domains.broad, *narrow)
    if order.kind == "broad_last":
        return (*narrow, domains.broad)
    if order.kind == "given":
        return tuple(order.sequence)
    shuffled = list(domains.names)
    random.Random(order.seed).shuffle(shuffled)
    return tuple(shuffled)


def step(config: Config) -> Step:
    settings = SequenceSettings(
        adapter=config.adapter,
        control=config.control,
        trainer=config.trainer,
        evaluation=config.evaluation,
        sequence=sequence_of(config.order, config.domains),
        steps_per_domain=config.order.steps_per_domain,
        order=config.order.name,
        model=config.model.name,
        seed=config.seed,
        logger=config.logger,
    )
    inputs = adapter_training.inputs(config)
    inputs["base_scores"] = evaluate.step(config, adapted=False)
    label = (
        f"sequential_forgetting {config.model.name} {config.adapter.name} "
        f"{config.order.name} seed {config.seed}"
    )
    cost = len(settings.sequence) * (config.order.steps_per_domain * config.model.layers * 0.02 + 4)
    return Step("sequential_forgetting", settings, inputs, label, cost=cost)


def build(context: Context) -> dict:
    settings: SequenceSettings = context.config
    source = context.inputs["domains"]
    model, tokenizer = load_base(context.inputs["base"])
    adapter, _ = adapter_training.new_adapter(
        model,
        settings.adapter,
        settings.control,
        context.inputs.get("saes", ()),
        settings.seed,
    )
    scorer = Scorer(source, model, tokenizer, settings.evaluation)
    names = scorer.domains.names
    base = context.inputs["base_scores"].json(evaluate.SCORES)["tasks"]
    first = {name: Score(**base[scorer.domains.target_tasks[name]]) for name in names}
    rows = [_row(first, names)]
    unfinished, weights = context.directory / UNFINISHED, context.directory / WEIGHTS
    if unfinished.is_file():
        rows = read_json(unfinished)
        adapter.load_state_dict(load_file(weights))
    with run_log(context, settings.logger) as log:
        for position in range(len(rows) - 1, len(settings.sequence)):
            _train(context, settings, model, adapter, tokenizer, position, log)
            scores = scorer.targets()
            rows.append(_row(scores, names))
            # Weights first: rows without them would skip a domain that nothing remembers.
            save_file(dict(adapter.state_dict()), weights)
            write_json(unfinished, rows)
            log.table("scores after each domain", ["stage", *names], _table(rows))
        matrix = [row["values"] for row in rows]
        metrics = forgetting_metrics(matrix, sequence=settings.sequence, domains=names)
        log.summary({f"forgetting/{name}": value for name, value in metrics.items()})
    record = {
        "model": settings.model,
        "adapter": settings.adapter.name,
        "seed": settings.seed,
        "fingerprint": context.fingerprint,
        "order": settings.order,
        "sequence": list(settings.sequence),
        "domains": list(names),
        "matrix": matrix,
        "stderr": [row["stderr"] for row in rows],
        "items": rows[0]["items"],
        "metrics": metrics,
    }
    write_json(context.directory / RESULT, record)
    for leftover in (unfinished, weights):
        leftover.unlink()
    shutil.rmtree(context.directory / "checkpoints", ignore_errors=True)
    return metrics


def _train(
    context: Context,
    settings: SequenceSettings,
    model,
    adapter,
    tokenizer,
    position: int,
    log: RunLog,
) -> None:
    """Train on one domain, with an optimizer and a schedule of its own."""
    domain = settings.sequence[position]
    rows, owners = training_rows(
        context.inputs["domains"], [domain], tokenizer, settings.trainer.max_length
    )
    fit(
        AdapterModule(
            model,
            adapter,
            config=settings.adapter,
            trainer=settings.trainer,
            total_steps=settings.steps_per_domain,
        ),
        ChatBatches(
            rows,
            owners,
            batch_size=settings.trainer.batch_size,
            pad_token_id=tokenizer.pad_token_id,
            seed=settings.seed * len(settings.sequence) + position,
        ),
        settings.steps_per_domain,
        trainer=settings.trainer,
        checkpoints=context.directory / "checkpoints" / f"{position}_{domain}",
        progress=context.progress,
        description=f"{context.label}: {domain} ({position + 1}/{len(settings.sequence)})",
        run_logger=log.lightning(),
    )
    model.eval()


def _row(scores: dict[str, Score], names: tuple[str, ...]) -> dict:
    """One row of the score matrix: a value and a standard error a domain."""
    return {
        "values": [scores[name].value for name in names],
        "stderr": [scores[name].stderr for name in names],
        "items": min(scores[name].items for name in names),
    }


def _table(rows: list[dict]) -> list[list]:
    return [[stage, *row["values"]] for stage, row in enumerate(rows)]


STAGE = register(
    Stage(
        "sequential_forgetting",
        1,
        build,
        skip=NOT_IDENTITY | {"trainer.max_steps", "evaluation.batch_size"},
    )
)
