"""What TopK SAEs leave unexplained after as many tokens, ours beside installed libraries'.

    python scripts/bench_sae_quality.py <artifact of stage activations>

Every contender trains on the same batches of stored activations, divided to a mean norm of sqrt(D),
and is measured on the same tokens that none has seen: the fraction of variance unexplained, and the
share of latents that none of these tokens activates. Each trains as its library does by default
(optimizer, rate, clipping, start of the decoder's bias), but for warm-ups that are longer than this
training: these are 5 % of it, as ours is. sparsify, dictionary_learning and SAELens join where they
are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steerlora.data.activations import ActivationBatches, ActivationStore
from steerlora.errors import UserError
from steerlora.saes.config import TopKConfig
from steerlora.saes.training import SAEModule, course, input_scale, start_on

HELD_OUT = 5000
"""Tokens that none is trained on."""
WARM_UP = 0.05
CLIP = 1.0
"""Norm of gradients that our trainings clip to (``trainer.gradient_clip``)."""


class Training(NamedTuple):
    """Attributes: batches: of activations [T, D], in their order; latents: N; k: of a token; seed:
    of the start."""

    batches: list[Tensor]
    latents: int
    k: int
    seed: int

    @property
    def width(self) -> int:
        return self.batches[0].shape[1]

    @property
    def warm_up(self) -> int:
        return int(WARM_UP * len(self.batches))


class Features(NamedTuple):
    """Attributes: active: [T, N] bool; output: [T, D], the reconstruction."""

    active: Tensor
    output: Tensor


Trained = Callable[[Tensor], Features]


class Figures(NamedTuple):
    """Attributes: fvu: fraction of the held-out tokens' variance that is left; dead: share of the
    latents; seconds: of the training."""

    fvu: float
    dead: float
    seconds: float


def main() -> None:
    options = parse_arguments()
    found: dict[str, list[Figures]] = {}
    for seed in options.seeds:
        for name, train in CONTENDERS.items():
            if name == OURS or installed(name.split(",")[0]):
                with redirect_stdout(sys.stderr):  # libraries say things
                    found.setdefault(name, []).append(measured(train, seed, options))
    if options.json:
        print(json.dumps({name: [one._asdict() for one in of] for name, of in found.items()}))
        return
    report(found, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="a folder with activations/store.json")
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--k", type=int, default=16, help="active latents per token")
    parser.add_argument("--batch-size", type=int, default=1024, help="tokens a step")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    options = parser.parse_args()
    try:
        options.store = ActivationStore(options.artifact / "activations")
    except UserError as error:
        parser.error(str(error))
    return options


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def measured(
    train: Callable[[Training], Trained], seed: int, options: argparse.Namespace
) -> Figures:
    held_out, batches = tokens_of(options, seed)
    torch.manual_seed(seed)  # some libraries start from torch's own generator
    started = time.perf_counter()
    run = train(Training(batches, options.latents, options.k, seed))
    seconds = time.perf_counter() - started
    with torch.no_grad():
        active, output = run(held_out)
    left = (held_out - output).square().sum() / (held_out - held_out.mean(0)).square().sum()
    return Figures(left.item(), 1 - active.any(0).float().mean().item(), seconds)


def tokens_of(options: argparse.Namespace, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Tokens set aside, the same of all seeds, and the others in batches; of mean norm sqrt(D)."""
    every = ActivationBatches([options.store], options.store.tokens, seed=0)(0).float()
    every /= every.norm(dim=1).mean() / every.shape[1] ** 0.5
    held_out, rows = every[:HELD_OUT], every[HELD_OUT:]
    return held_out, list(passes(rows, options, seed))


def passes(rows: Tensor, options: argparse.Namespace, seed: int) -> Iterator[Tensor]:
    """As many batches as there are steps, pass after pass, each in another order."""
    generator, order = torch.Generator().manual_seed(seed), torch.zeros(0, dtype=torch.long)
    for _ in range(options.steps):
        if len(order) < options.batch_size:
            order = torch.randperm(len(rows), generator=generator)
        chosen, order = order[: options.batch_size], order[options.batch_size :]
        yield rows[chosen]


def steerlora(training: Training) -> Trained:
    config = TopKConfig(latents=training.latents, k=training.k, seed=training.seed)
    first, steps = training.batches[0], len(training.batches)
    scale, sae = input_scale(config, first), config.build(training.width)
    start_on(sae, config, first / scale)
    module = SAEModule(sae, scale=scale, **course(config, steps, len(first)))
    found = module.configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    for step, x in enumerate(training.batches):
        loss, _ = module.step(x, step, in_full=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        sae.normalize_decoder()
    sae.rescale(scale)
    return lambda x: Features(sae.encode(x).dense(sae.latents) > 0, sae(x))


def sparsify(training: Training, optimizer: str = "signum") -> Trained:
    """By the course of its ``Trainer``, which takes a model and text alone."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from transformers import get_linear_schedule_with_warmup

    sae = SparseCoder(training.width, SparseCoderConfig(num_latents=training.latents, k=training.k))
    sae.b_dec.data = training.batches[0].mean(0)
    size = (training.latents / 2**14) ** 0.5
    if optimizer == "signum":
        stepping = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3 / size), momentum=0.95)
        stepping.train()
    else:
        stepping = torch.optim.Adam(sae.parameters(), lr=2e-4 / size)
        schedule = get_linear_schedule_with_warmup(
            stepping, training.warm_up, len(training.batches)
        )
    for x in training.batches:
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        stepping.step()
        stepping.zero_grad()
        if optimizer == "adam":
            schedule.step()
    if optimizer == "signum":
        stepping.eval()

    def run(x: Tensor) -> Features:
        out = sae(x)
        active = torch.zeros(len(x), training.latents, dtype=torch.bool)
        return Features(active.scatter(1, out.latent_indices, out.latent_acts > 0), out.sae_out)

    return run


def sparsify_adam(training: Training) -> Trained:
    return sparsify(training, "adam")


def dictionary_learning(training: Training) -> Trained:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=len(training.batches),
        activation_dim=training.width,
        dict_size=training.latents,
        k=training.k,
        layer=0,
        lm_name="",
        warmup_steps=training.warm_up,
        seed=training.seed,
        device="cpu",
    )
    for step, x in enumerate(training.batches):
        trainer.update(step, x)
    ae = trainer.ae

    def run(x: Tensor) -> Features:
        features = ae.encode(x)
        return Features(features > 0, ae.decode(features))

    return run


def sae_lens(training: Training) -> Trained:
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    config = TopKTrainingSAEConfig(d_in=training.width, d_sae=training.latents, k=training.k)
    size, steps = len(training.batches[0]), len(training.batches)
    rate = SAETrainerConfig.lr
    options = SAETrainerConfig(size * steps, size, lr_end=rate / 10)
    sae = SAETrainer(options, TopKTrainingSAE(config), iter(training.batches)).fit()

    def run(x: Tensor) -> Features:
        features = sae.encode(x)
        return Features(features > 0, sae.decode(features))

    return run


OURS = "steerlora"
CONTENDERS: dict[str, Callable[[Training], Trained]] = {
    OURS: steerlora,
    "sparsify": sparsify,
    "sparsify, Adam": sparsify_adam,
    "dictionary_learning": dictionary_learning,
    "sae_lens": sae_lens,
}


def report(found: dict[str, list[Figures]], options: argparse.Namespace) -> None:
    tokens = options.batch_size * options.steps
    title = f"{tokens:,} tokens, {options.latents} latents, k {options.k}"
    table = Table(title=f"{title}, seeds {', '.join(map(str, options.seeds))}")
    for column in ("contender", "FVU", "of each seed", "dead, %", "seconds"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, of in found.items():
        means = [statistics.mean(values) for values in zip(*of, strict=True)]
        each = " ".join(f"{one.fvu:.4f}" for one in of)
        row = (f"{means[0]:.4f}", each, f"{100 * means[1]:.1f}", f"{means[2]:.1f}")
        table.add_row(name, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
