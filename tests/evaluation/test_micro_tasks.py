"""The micro world's lm-eval tasks, run by lm-eval on a tiny untrained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import Qwen3Config, Qwen3ForCausalLM

import steerlora.evaluation.tasks.micro as micro_tasks
from steerlora.data.domains import micro
from steerlora.errors import UserError
from steerlora.evaluation.tasks.documents import documents
from steerlora.evaluation.tasks.micro import verifiers

TASKS = Path(micro_tasks.__file__).parent


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[dict, dict]:
    """lm-eval's results on ten items of every task, and the description of the domains."""
    directory = tmp_path_factory.mktemp("micro")
    sizes = {"pretraining_items": 10, "train_items_per_domain": 10, "evaluation_items": 12}
    micro.write(directory, **sizes)
    tokenizer = micro.build_tokenizer(directory / "tokenizer")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    lm = HFLM(pretrained=Qwen3ForCausalLM(config), tokenizer=tokenizer, batch_size=16)
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"domains_dir": str(directory)}
    )
    results = simple_evaluate(
        model=lm,
        tasks=manager.all_tasks,
        task_manager=manager,
        apply_chat_template=True,
        log_samples=True,
        bootstrap_iters=1,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    return results, json.loads((directory / "domains.json").read_text())


def test_every_task_of_the_description_is_scored_by_its_metric(evaluated):
    results, description = evaluated
    assert results["results"].keys() == description["metrics"].keys()
    assert len(results["results"]) == len(list(TASKS.glob("*.yaml"))) == 9
    for task, metric in description["metrics"].items():
        name, _, kind = metric.partition(",")
        assert 0 <= results["results"][task][metric] <= 1
        assert isinstance(results["results"][task][f"{name}_stderr,{kind}"], float)
        assert results["versions"][task] == micro.WORLD_VERSION
        assert results["n-samples"][task]["effective"] == 12
        assert all(name in sample for sample in results["samples"][task])


def test_all_four_ifeval_scores_have_a_standard_error(evaluated):
    scores = evaluated[0]["results"]["micro_ifeval"]
    for level in ("prompt", "inst"):
        for manner in ("strict", "loose"):
            assert isinstance(scores[f"{level}_level_{manner}_acc_stderr,none"], float)


def test_choices_are_single_known_words_after_the_chat_prompt(evaluated, tmp_path):
    tokenizer = micro.build_tokenizer(tmp_path)
    for task in ("micro_mmlu", "micro_mmlu_pro"):
        for sample in evaluated[0]["samples"][task]:
            for number, choice in enumerate(sample["doc"]["choices"]):
                context, continuation = sample["arguments"][number]
                assert context.startswith("<|user|>")
                assert context.endswith("<|assistant|>")
                assert continuation == choice
                both, alone = tokenizer(context + continuation).input_ids, tokenizer(context)
                assert len(both) == len(alone.input_ids) + 1
                assert tokenizer.unk_token_id not in both


def test_generation_has_room_for_every_right_answer(evaluated, tmp_path):
    tokenizer = micro.build_tokenizer(tmp_path)
    results = evaluated[0]
    micro.write(tmp_path, pretraining_items=1, train_items_per_domain=1)
    for task, config in results["configs"].items():
        if config["output_type"] != "generate_until":
            continue
        assert config["generation_kwargs"]["do_sample"] is False
        lines = (tmp_path / "evaluation" / f"{task}.jsonl").read_text().splitlines()
        lengths = [len(tokenizer(json.loads(line)["response"]).input_ids) for line in lines]
        assert max(lengths) < config["generation_kwargs"]["max_gen_toks"], "no room to end"


def test_documents_say_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="--metadata"):
        documents(file="micro_law")
    with pytest.raises(UserError, match=r"micro_law.jsonl is missing"):
        documents(file="micro_law", domains_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("wanted", "written", "score"),
    [
        ("22 coins", " 22 coins ", 1.0),
        ("22 coins", "22 drops", 0.0),
        ("22 coins", "22 coins coins", 0.0),
        ("3 #### 7", "3 #### 7", 1.0),
        ("3 #### 7", "4 #### 7", 1.0),
        ("3 #### 7", "3 #### 8", 0.0),
        ("3 #### 7", "3 7", 0.0),
    ],
)
def test_exact_match(wanted, written, score):
    assert verifiers.exact_match({"response": wanted}, [written]) == {"exact_match": score}


@pytest.mark.parametrize(
    ("kind", "arguments", "obeys", "breaks"),
    [
        ("keywords:frequency", {"keyword": "tin", "frequency": 2}, "tin fern tin", "tin tin tin"),
        ("order:reverse", {"words": ["a", "b", "c"]}, "x c , b , a", "c a b"),
        ("content:category", {"members": ["a", "b", "c"], "number": 2}, "a x b", "a x a"),
        ("length:number_words", {"number": 2, "topic": "x"}, '" x , y "', "x y z"),
        ("startend:start_word", {"word": "tin"}, '" tin fern "', "fern tin"),
        ("startend:end_word", {"word": "tin"}, "fern tin .", "tin fern"),
        ("startend:quotation", {}, '" fern "', '" fern'),
        ("keywords:existence", {"keyword": "tin"}, "fern tin", "fern"),
        ("keywords:forbidden", {"keyword": "tin"}, "fern", "fern tin"),
        ("punctuation:comma", {}, '" a , b , c "', "a , b c"),
    ],
)
def test_verifiers(kind, arguments, obeys, breaks):
    assert verifiers.follows(obeys, kind, {**arguments, "other": None})
    assert not verifiers.follows(breaks, kind, arguments)
    assert not verifiers.follows(" ", kind, arguments)


def test_every_verifier_is_tested_above_and_used_below():
    from steerlora.data.domains.micro import instructions

    assert verifiers.VERIFIERS.keys() == {*instructions.CONTENT, *instructions.FORMAT}


def test_loose_forgives_a_courtesy_and_strict_does_not():
    document = {
        "instruction_id_list": ["startend:start_word", "length:number_words"],
        "kwargs": [{"word": "tin", "number": None}, {"word": None, "number": 2}],
    }
    scores = verifiers.process_results(document, ["fern . tin opal"])
    assert scores == {
        "prompt_level_strict_acc": 0.0,
        "inst_level_strict_acc": 0.0,
        "prompt_level_loose_acc": 1.0,
        "inst_level_loose_acc": 1.0,
    }
    half = verifiers.process_results(document, ["tin opal ivy"])
    assert (half["prompt_level_strict_acc"], half["inst_level_strict_acc"]) == (0.0, 0.5)
