"""What tests everywhere need: a tiny random Qwen3, SAE and adapter, and processes to run in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import runs
import torch
from hypothesis import settings
from runs import Starter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import RoutedLoRAConfig
from steerlora.saes.topk import TopK

LAYERS, WIDTH, VOCABULARY, LATENTS, K = 3, 32, 61, 64, 5

torch.set_num_threads(1)

# Examples are a function of the test alone, and time is no assertion.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

SLOW = (
    *("ranks", "cli", "stages", "extension", "planning", "scripts", "readme"),
    *("test_harness.py", "test_paper.py", "test_punkt.py", "test_report.py"),
    *("test_generation.py", "test_gguf.py", "test_shards.py", "test_sharded.py"),
)
"""Folders and files whose tests take seconds: ``make test-fast`` leaves them out."""

LONG = (
    *("ranks/test_torchrun.py", "planning/test_measured.py", "stages/test_another_machine.py"),
    *("[steerlora experiment=micro_full]", "[steerlora experiment=calibration]"),
    *("[steerlora experiment=text", "[steerlora stage=plan"),
    *("test_two_jobs_of_two_ranks_one", "test_a_plugin_of_the_current_folder_reaches_the_jobs"),
    *("saves_the_step_that_it_came_in[base]", "saves_the_step_that_it_came_in[sae_training]"),
    *("test_a_base_that_one_gpu_cannot_hold", "test_offloading_is_named"),
    *("test_a_larger_gpu_is_advised", "test_where_nothing_helps_the_text"),
)
"""Parts of the names of tests that take half a minute or repeat at length what others test:
``make test`` leaves them to ``make test-all``."""


TOGETHER = {
    "tests/stages/": "the smoke experiment",
    "tests/ranks/": "the zygote",
    "tests/readme/test_commands.py": "the zygote",
    "tests/distributed/test_shards.py": "the zygote",
}
"""{beginning of a test's name: what it shares}: built once, by the one worker that has them all."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """As ``--dist loadfile``, and what shares something in one process too."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            own = super()._split_scope(nodeid)
            return next((what for part, what in TOGETHER.items() if own.startswith(part)), own)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow and long ones, the slow first, and first of all what stays together: what is quick
    fills both workers to the end."""
    for item in items:
        if any(part in item.nodeid for part in LONG):
            item.add_marker("long")
        if set(SLOW) & set(item.path.relative_to(item.config.rootpath).parts):
            item.add_marker("slow")
    together = tuple(TOGETHER)
    items.sort(
        key=lambda item: (
            not item.nodeid.startswith(together),
            item.get_closest_marker("slow") is None,
        )
    )


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A run in this process sets levels, and Hydra handlers of streams that end with the test."""
    loggers = logging.root, logging.getLogger("steerlora")
    handlers, levels = list(logging.root.handlers), [logger.level for logger in loggers]
    yield
    logging.root.handlers = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def ask() -> Iterator[Callable[..., int | None]]:
    """Starts and polls processes that have imported what is slow (``ranks/zygote.py``)."""
    yield from runs.zygote()


@pytest.fixture
def start(ask, tmp_path) -> Iterator[Starter]:
    """Runs of the command line, and ranks of one; ended with the test."""
    starter = Starter(tmp_path, ask)
    yield starter
    starter.close()


@pytest.fixture
def make_model() -> Callable[..., Qwen3ForCausalLM]:
    """``make_model(dtype=torch.float32, seed=0, **config)``: weights large enough to matter."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Qwen3ForCausalLM:
        config = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Qwen3ForCausalLM(Qwen3Config(**(config | changes)))
        return model.to(dtype).eval()

    return make


@pytest.fixture
def make_sae() -> Callable[..., TopK]:
    """``make_sae(seed=0, width=WIDTH)``: random directions and a random bias."""

    def make(seed: int = 0, width: int = WIDTH) -> TopK:
        sae = TopK(width, LATENTS, k=K, seed=seed)
        with torch.no_grad():
            sae.b_enc.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        return sae

    return make


@pytest.fixture
def make_adapter(make_sae) -> Callable[..., Adapter]:
    """``make_adapter(model, signal="sae", sites=(1,), **config)``: attached, with random weights.

    B, router weights and biases are random, as after training: at B = 0 nothing would be tested.
    The rank is dynamic wherever a router learns.
    """

    def make(model: nn.Module, signal: str = "sae", sites=(1,), **changes) -> Adapter:
        learns = signal != "none" and changes.get("router") != "prototype"
        small = {"specialists": 4, "rank": 3, "alpha": 6.0, "top_k": 2, "dynamic_rank": learns}
        config = RoutedLoRAConfig(signal=signal, sites=list(sites), **(small | changes))
        saes = {site: make_sae(seed=site) for site in sites} if signal == "sae" else {}
        adapter = Adapter(model, config, saes, feature_scales=dict.fromkeys(sites, 2.5))
        randomize(adapter)
        return adapter.to(next(model.parameters()).dtype).attach(model)

    return make


TEMPLATES = {
    # What Qwen3's does: a switch for thinking.
    "thinking": """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == "assistant" %}<think>

</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}""",
    # Without one, and with an end of turn that is not the end of text, as in Gemma's.
    "plain": """{%- for message in messages -%}
<turn>{{ message.role }}
{{ message.content }}<end_of_turn>
{% endfor %}
{%- if add_generation_prompt %}<turn>assistant
{% endif %}""",
    "none": None,
}


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``make_tokenizer(template="thinking", eos="<|im_end|>")``: every byte is a token."""

    def make(template: str = "thinking", eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        special = ["<pad>", eos, "<|im_start|>", "<turn>", "<end_of_turn>", "<think>", "</think>"]
        vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(special)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos, bos_token=None
        )
        fast.chat_template = TEMPLATES[template]
        return fast

    return make


@torch.no_grad()
def randomize(adapter: Adapter) -> None:
    generator = torch.Generator().manual_seed(1)
    for layer in adapter.layers.values():
        layer.B.normal_(0, 0.2, generator=generator)
    for router in adapter.routers.values():
        for name, parameter in router.named_parameters():
            if name.endswith("weight"):
                parameter.normal_(0, 0.7, generator=generator)
            else:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def tokens() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``tokens([5, 8, 3])``: right-padded ids and mask; real ids are never the padding's 0."""

    def make(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        return ids * mask, mask

    return make
