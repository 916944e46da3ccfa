"""lm-eval and us: our models as its models, domains as its tasks, its scores as ours."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import lm_eval
from lm_eval.api.metrics import pooled_sample_stderr
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerlora.config.model import DATE
from steerlora.errors import UserError, nearest
from steerlora.evaluation import registered
from steerlora.evaluation.local_rows import LocalRows
from steerlora.evaluation.registered import Loaded
from steerlora.evaluation.scores import Score
from steerlora.evaluation.statistics import standard_error
from steerlora.evaluation.suite import OWN, Suite
from steerlora.lm.dates import pin_date
from steerlora.methods.interventions import INTERVENTIONS
from steerlora.methods.saving import load_adapter, trained_under

TASKS = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234
"""lm-eval's own default."""
THINKING, THOUGHT = "<think>", "</think>"
"""What a model that thinks before it answers writes around its thoughts."""

datasets.disable_progress_bars()
for noisy in ("lm_eval", "lm-eval", "lm_eval.evaluator", "lm_eval.models.huggingface"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


@register_model("steerlora")
class SteerLoRALM(HFLM):
    """A base model with an adapter, and if wanted an intervention, for lm-eval.

    ``--model steerlora --model_args pretrained=<base>,adapter=<folder>,intervention=shuffle``

    Args:
        pretrained: directory or hub id of the base, or a live model.
        adapter: folder of a saved adapter; None scores the base (or a live model as it is).
        sae: folder of its SAE, where it is not at the recorded place.
        intervention: a control that acts during every request, or "none"; an adapter that was
            trained under one must be told which.
        intervention_seed, intervention_domain, intervention_strength: its seed, the true domain for
            ``oracle_domain``, and how much of the changed signal is mixed in, from 0 to 1.
        date: what the chat template of a directory or hub id prints as today, where it does.
        kwargs: HFLM's own.

    Attributes:
        cut: (task, number of the item) of the prompts that lost their beginning, as they did not
            fit into the context beside the answer.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        adapter: str | None = None,
        sae: str | None = None,
        intervention: str | None = None,
        intervention_seed: int = 0,
        intervention_domain: str | None = None,
        intervention_strength: float = 1.0,
        date: str = DATE,
        **kwargs: Any,
    ) -> None:
        pretrained, adapter, sae = map(_at_home, (pretrained, adapter, sae))
        super().__init__(pretrained=pretrained, **kwargs)
        if isinstance(pretrained, str):  # the tokenizer of a live model has been told
            pin_date(self.tokenizer, date)
        self.cut: set[tuple[str, int]] = set()
        self._cut_texts: set[str] = set()
        self.adapter = load_adapter(self.model, adapter, sae=sae) if adapter else None
        if intervention and self.adapter is None:
            raise UserError(f"intervention={intervention} needs adapter=<folder>")
        under = trained_under(adapter) if adapter else "none"
        if intervention is None and under != "none":
            raise UserError(
                f"adapter {adapter} was trained under an intervention: pass intervention={under}, "
                "or intervention=none to score it without"
            )
        if intervention not in (None, "none"):
            INTERVENTIONS.check("intervention", intervention)
        self._control = contextlib.nullcontext
        if intervention not in (None, "none"):
            self._control = partial(
                self.adapter.intervention,
                intervention,
                seed=int(intervention_seed),
                domain=intervention_domain,
                strength=float(intervention_strength),
            )

    def generate_until(self, requests, disable_tqdm: bool = True):
        with self._control():
            answers = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._count_cut(requests)
        if self.think_end_token is None:
            return answers
        # lm-eval drops thoughts up to their end; those that were cut off before it answer nothing.
        return ["" if answer.lstrip().startswith(THINKING) else answer for answer in answers]

    def loglikelihood(self, requests, disable_tqdm: bool = True):
        with self._control():
            answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._count_cut(requests)
        return answers

    def tok_batch_encode(
        self, strings, padding_side="left", left_truncate_len=None, truncation=False
    ):
        """As lm-eval's, which cuts prompts here without saying which."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            lengths = mask.sum(1).tolist()
            self._cut_texts |= {
                text
                for text, length in zip(strings, lengths, strict=True)
                if length > left_truncate_len
            }
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        """As lm-eval's, which cuts what is longer than this without saying which."""
        self._cut_texts |= {
            texts[0]
            for texts, context, continuation in requests
            if texts and len(context) + len(continuation) > self.max_length + 1
        }
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _count_cut(self, requests) -> None:
        self.cut |= {(r.task_name, r.doc_id) for r in requests if r.args[0] in self._cut_texts}
        self._cut_texts.clear()


class Harness:
    """lm-eval with the tasks of one suite loaded once.

    Args:
        suite: the tasks, and how they are run.
        extra_paths: folders of further task files.
    """

    def __init__(self, suite: Suite, extra_paths: Sequence[Path] = ()) -> None:
        self.suite = suite
        domains = suite.domains
        self.manager = TaskManager(
            include_path=[str(TASKS / domains.kind), *map(str, extra_paths)],
            include_defaults=False,
            metadata={"domains_dir": str(domains.directory)},
        )
        self._loaded: dict[str, Loaded] = {}

    def _load(self, name: str) -> Loaded:
        if name not in self._loaded:
            # lm-eval skips a task file that does not parse without a word.
            if name in self.manager.all_tasks:
                self._loaded[name] = Loaded(self.manager.load([name])["tasks"])
            elif name.startswith(OWN):
                raise UserError(f"no lm-eval task {name}: {nearest(name, self.manager.all_tasks)}")
            else:
                config = self.suite.config
                self._loaded[name] = registered.load(
                    name,
                    local=LocalRows.of(name, config),
                    shots=config.shots.get(name),
                    folder=config.include_path,
                    limit=self.suite.limit_of(name),
                )
        return self._loaded[name]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[str],
        *,
        batch_size: int,
        max_length: int,
    ) -> dict[str, Score]:
        """Score a live model (as it is, with its adapter and intervention) on tasks.

        The model stays on the device, or the devices, where it is.

        Raises:
            UserError: an unknown task or metric, or a task's data cannot be had.
        """
        loaded = {name: self._load(name) for name in tasks}
        scores = {}
        for names in self._together(loaded):
            batch = {name: loaded[name] for name in names}
            generative = all(one.generative for one in batch.values())
            lm = SteerLoRALM(
                model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                # The likelihood of an answer is asked for where it would stand: after no thoughts.
                enable_thinking=None if generative else False,
                think_end_token=tokenizer.added_tokens_encoder.get(THOUGHT),
            )
            results = self._evaluate(lm, batch, generative)
            scores |= {
                name: self._score(name, one, results, cut=sum(t in one.tasks for t, _ in lm.cut))
                for name, one in batch.items()
            }
        return {name: scores[name] for name in tasks}

    def _together(self, loaded: dict[str, Loaded]) -> Iterator[list[str]]:
        """Which tasks share batches: the domains' of a kind and a limit; lm-eval's may share their
        tasks."""
        own = [name for name in loaded if name in self.manager.all_tasks]
        alike: dict[tuple[bool, int | None], list[str]] = {}
        for name in own:
            alike.setdefault((loaded[name].generative, self.suite.limit_of(name)), []).append(name)
        yield from (alike[key] for key in sorted(alike, key=lambda key: key[0]))
        yield from ([name] for name in loaded if name not in own)

    def _evaluate(self, lm: SteerLoRALM, batch: dict[str, Loaded], generative: bool) -> dict:
        config = self.suite.config
        tasks = {name: task for one in batch.values() for name, task in one.tasks.items()}
        groups = {name: one.group for name, one in batch.items() if one.group}
        for task in tasks.values():
            # As lm-eval does before each run: every model sees the same examples.
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            if task.OUTPUT_TYPE == "generate_until":
                own = task.config.generation_kwargs.get("max_gen_toks", lm.max_gen_toks)
                most = min(config.max_generated_tokens or own, lm.max_length // 2)
                task.set_config("generation_kwargs", {"max_gen_toks": most}, update=True)
        limits = [self.suite.limit_of(next(iter(batch)))]
        if generative and not tasks.keys() & set(self.manager.all_tasks):
            limits.append(config.generation_items)
        with _quiet():
            # Its `evaluate`, not `simple_evaluate`: that one reseeds every random generator and
            # lists the machine's packages by sub-processes, a second a call.
            return lm_eval.evaluate(
                lm=lm,
                task_dict={
                    "tasks": tasks,
                    "groups": groups,
                    "group_map": {name: group.child_names for name, group in groups.items()},
                },
                limit=min((limit for limit in limits if limit), default=None),
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
            )

    def _score(self, name: str, loaded: Loaded, results: dict, *, cut: int) -> Score:
        figures = {
            key: value
            for key, value in results["results"][name].items()
            if isinstance(value, float) and "stderr" not in key
        }
        chosen = self.suite.metrics.get(name, next(iter(figures)))
        if chosen not in figures:
            raise UserError(f"evaluation.metrics.{name}={chosen}: {nearest(chosen, figures)}")
        metric, chosen_filter = chosen.split(",")
        items = [
            [
                _number(sample[metric])
                for sample in results["samples"][task]
                if sample.get("filter", "none") == chosen_filter
            ]
            for task in loaded.tasks
        ]
        per_item = [item for of_task in items for item in of_task]
        return Score(
            metric=chosen,
            value=figures[chosen],
            stderr=_standard_error(items),
            items=len(per_item),
            version=str(results["versions"].get(name)),
            per_item=per_item,
            others={key: value for key, value in figures.items() if key != chosen},
            shots=results["n-shot"].get(name),
            cut=cut,
        )


def _at_home(place: Any) -> Any:
    """A path with the home folder in place of ``~``; anything else as it is."""
    if isinstance(place, str) and place.startswith("~"):
        return str(Path(place).expanduser())
    return place


def _standard_error(items: Sequence[Sequence[float]]) -> float:
    """Of the mean over all items; of a group's, as lm-eval has it: pooled within its tasks."""
    sizes = [len(of_task) for of_task in items]
    if sum(sizes) == len(sizes) or len(sizes) == 1:
        return standard_error([item for of_task in items for item in of_task])
    return float(pooled_sample_stderr([standard_error(of_task) for of_task in items], sizes))


def _number(value: Any) -> float:
    if isinstance(value, list | tuple):
        return sum(map(float, value)) / max(len(value), 1)
    return float(value)


@contextlib.contextmanager
def _quiet():
    """lm-eval's progress bars out of the way: ours stand in for them."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
