"""Stage ``base``: the frozen language model, pretrained here or pointed at."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from steerlora.config import Config, LoggerConfig, ModelConfig, TrainerConfig
from steerlora.data.batches import ChatBatches, batches_by_length
from steerlora.data.chat import encode_chats
from steerlora.data.cuts import warn_of_cuts
from steerlora.data.domains.micro import build_tokenizer as build_micro_tokenizer
from steerlora.data.domains.text.tokenizer import build_tokenizer as build_text_tokenizer
from steerlora.distributed import ranks
from steerlora.distributed.strategies import check_divides
from steerlora.engine.content import MEMORY, ContentHashes, absolute
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.lm.gguf import convert, gguf_file
from steerlora.lm.identity import model_fingerprint
from steerlora.lm.pretrained import (
    PretrainedFacts,
    describe,
    open_tokenizer,
    qwen3_config,
    shape_of,
)
from steerlora.lm.weight_files import commit_of
from steerlora.stages import domains
from steerlora.stages.common import (
    ADAPTER_ONLY,
    BASE,
    NOT_IDENTITY,
    POINTER,
    identity_of_model,
    read_rows,
    run_log,
    train,
)
from steerlora.training.language import PretrainingModule

HELD_OUT_EVERY = 40
"""One row of pretraining text in so many says when a base has converged, and does not train."""
HELD_OUT_BATCH = 128
"""Rows of it in a forward."""


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Attributes: identity: of the files behind ``model.path`` and ``model.chat_template``; gguf:
    the GGUF file that is dequantised into the artifact; chat_template: what its file holds; the
    others, where no model is given, are those of the pretraining."""

    model: ModelConfig
    identity: str = ""
    gguf: str = ""
    chat_template: str | None = None
    kind: str = ""
    max_length: int = 0
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


def step(config: Config) -> Step:
    model, template = config.model, _chat_template(config.model)
    if file := gguf_file(model):
        settings = BaseSettings(
            # Its content alone counts: nothing that follows reads the file.
            model=replace(model, path="gguf", gguf_file=None),
            identity=_with_template(_identity_of_gguf(file, config), template),
            gguf=str(file),
            chat_template=template,
        )
        return Step("base", settings, {}, f"base {model.name}", cost=5)
    if model.path:
        # By one name, wherever the run starts: later ones may start elsewhere.
        model = replace(model, path=absolute(model.path))
        identity = identity_of_model(model.path, config.artifacts.root)
        settings = BaseSettings(
            model=model, identity=_with_template(identity, template), chat_template=template
        )
        return Step("base", settings, {}, f"base {model.name}", cost=5)
    if not config.domains.has_general_text:
        raise UserError(
            f"model={model.name} is pretrained here, on general text, and domains="
            f"{config.domains.name} bring none: give domains.general=<jsonl file>, or another model"
        )
    settings = BaseSettings(
        model=model,
        kind=config.domains.kind,
        max_length=config.trainer.max_length,
        trainer=config.trainer,
        logger=config.logger,
    )
    cost = model.steps * model.layers * model.width**2 * 1e-6
    inputs = {"domains": domains.step(config)}
    return Step("base", settings, inputs, f"base {model.name}", cost=cost)


def _chat_template(model: ModelConfig) -> str | None:
    """What the file of ``model.chat_template`` holds."""
    if model.chat_template is None:
        return None
    try:
        return Path(model.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"model.chat_template={model.chat_template} cannot be read: give a file with a chat "
            "template (Jinja)"
        ) from error


def _with_template(identity: str, template: str | None) -> str:
    if template is None:
        return identity
    return f"{identity} template {hashlib.sha256(template.encode()).hexdigest()}"


def _identity_of_gguf(file: Path, config: Config) -> str:
    (content,) = ContentHashes(Path(config.artifacts.root).expanduser() / MEMORY).of([file])
    wanted = config.model.sha256
    if wanted not in (None, content):
        raise UserError(
            f"model.path={file} is another file than model.sha256={wanted}: its SHA-256 is "
            f"{content}: fetch it again, or set model.sha256=null"
        )
    return content


def inputs(config: Config) -> dict[str, Step]:
    """What the stages read that run the base on the domains' text."""
    return {"domains": domains.step(config), "base": step(config)}


def _check(settings: BaseSettings) -> None:
    if not settings.model.path:
        parts = ranks.current().world * settings.trainer.accumulate
        check_divides("model.batch_size", settings.model.batch_size, parts)


@stage(
    "base",
    3,
    step=step,
    skip=NOT_IDENTITY
    | ADAPTER_ONLY
    | {"model.name", "model.control_sites", "model.sae_latents", "model.sae_path", "model.sae_k"}
    | {"model.context_length", "model.adapter_learning_rate", "model.chat_template"}
    | {"gguf", "chat_template", "model.gguf_file", "model.sha256", "model.wheel", "model.instead"},
    shared=True,
    check=_check,
)
def build(context: Context) -> dict:
    settings: BaseSettings = context.config
    figures, given = {}, settings.model
    if given.path:
        if not ranks.is_main():
            return {}
        if settings.gguf:
            given = replace(given, path=settings.gguf)
            facts = _from_gguf(context, given, settings.chat_template)
        else:
            facts = _at(given.path, given, settings.chat_template)
    else:
        model, figures = _pretrain(context, settings)
        if not ranks.is_main():
            return {}
        parameters = sum(p.numel() for p in model.parameters())
        facts = PretrainedFacts(model_fingerprint(model), parameters, shape_of(model.config))
    template = {} if settings.chat_template is None else {"chat_template": settings.chat_template}
    write_json(
        context.directory / POINTER,
        template
        | {
            "path": None if settings.gguf else given.path,
            # The commit, so that all that follows reads what is described here.
            "revision": None
            if settings.gguf or given.path is None
            else commit_of(given.path, given.revision),
            "thinking": given.thinking,
            "date": given.date,
            "fingerprint": facts.fingerprint,
            "layers": facts.shape["layers"],
            "width": facts.shape["width"],
        },
    )
    return {**figures, "parameters": facts.parameters, "fingerprint": facts.fingerprint}


def _at(path: str, given: ModelConfig, template: str | None) -> PretrainedFacts:
    """The facts of a given model in a Hugging Face folder or at a hub id."""
    try:
        open_tokenizer(
            *(path, given.revision),
            thinking=given.thinking,
            date=given.date,
            chat_template=template,
        )
        facts = describe(path, given.revision)
    except UserError as error:
        if given.instead is None or "hub" not in str(error):
            raise
        raise UserError(
            f"{error}; model={given.instead} is the same model from elsewhere"
        ) from error
    _refuse_other_shape(given, facts.shape)
    return facts


def _from_gguf(context: Context, given: ModelConfig, template: str | None) -> PretrainedFacts:
    """Dequantise a GGUF file into the artifact; the facts of what is written."""
    home = context.directory / BASE
    convert(Path(given.path), home)
    try:
        return _at(str(home), replace(given, revision=None), template)
    except UserError as error:
        raise UserError(str(error).replace(str(home), given.path)) from error


def _refuse_other_shape(declared: ModelConfig, found: dict[str, int | bool]) -> None:
    """UserError where the files hold a model of another shape than the configuration says."""
    other = {key: value for key, value in found.items() if getattr(declared, key) != value}
    if other:
        right = " ".join(f"model.{key}={str(value).lower()}" for key, value in other.items())
        raise UserError(
            f"model.path={declared.path} has another shape than the configuration says: set {right}"
        )


def _pretrain(context: Context, settings: BaseSettings) -> tuple[Qwen3ForCausalLM, dict]:
    shape, source, home = settings.model, context.inputs["domains"], context.directory / BASE
    if ranks.is_main():
        if settings.kind == "micro":
            build_micro_tokenizer(home)
        else:
            build_text_tokenizer(source.path, vocabulary=shape.vocabulary).save_pretrained(home)
    ranks.barrier()
    tokenizer = AutoTokenizer.from_pretrained(home)
    torch.manual_seed(shape.seed)
    model = Qwen3ForCausalLM(
        qwen3_config(
            shape,
            vocab_size=len(tokenizer),
            max_position_embeddings=max(1024, settings.max_length),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    rows = encode_chats(tokenizer, read_rows(source / "pretrain.jsonl"), settings.max_length)
    if ranks.is_main():
        warn_of_cuts({"pretraining": rows}, settings.max_length)
    held_out = rows[::HELD_OUT_EVERY]
    rows = [row for index, row in enumerate(rows) if index % HELD_OUT_EVERY]
    batches = ChatBatches(
        rows,
        [-1] * len(rows),
        batch_size=shape.batch_size,
        pad_token_id=tokenizer.pad_token_id,
        seed=shape.seed,
        prompt_weight=shape.prompt_weight,
    )
    module = PretrainingModule(
        model.train(),
        matrix_learning_rate=shape.matrix_learning_rate,
        learning_rate=shape.learning_rate,
        held_out=list(batches_by_length(held_out, HELD_OUT_BATCH, tokenizer.pad_token_id)),
        target_loss=shape.target_loss or 0.0,
        tolerance=shape.tolerance,
        most_steps=shape.steps,
    )
    # A model this small is whole on every rank; Muon needs whole matrices.
    strategy = "single" if ranks.current().world == 1 else "ddp"
    trainer = replace(settings.trainer, strategy=strategy, offload=False)
    with run_log(context, settings.logger) as log:
        figures = train(context, module, batches, shape.steps, log, trainer=trainer)
        figures |= {"converged": module.converged, "heldout_loss": module.held_out_loss}
        log.results(figures)
    if not ranks.is_main():
        return model, figures
    model.eval().save_pretrained(home)
    generation = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    (home / "generation_config.json").write_text(json.dumps(generation) + "\n")
    return model, figures
