"""Two ranks compute what one process does, under every strategy, for every stage that trains.

Tolerance: losses to 1e-5 of themselves, weights after 8 steps at a learning rate of 1e-2 to 5e-5;
sums over two ranks are taken in another order. Under autocast one rounding of a bfloat16 sum may
differ: losses to 2e-2.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import runs
import torch
import trainings
from runs import ADAPTER, MEMORY, Starter, trained
from safetensors.torch import load_file

from steerlora.methods.saving import WEIGHTS

LOSS, WEIGHT, AUTOCAST = 1e-5, 5e-5, 2e-2


@pytest.fixture(scope="module")
def two(ask, tmp_path_factory) -> Path:
    """All trainings, by two ranks in one go."""
    folder = tmp_path_factory.mktemp("two")
    for rank in Starter(folder, ask).ranks(str(folder), script=Path(trainings.__file__)):
        rank.ends_well(patience=300)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The same by one process; what differs by strategy alone is run once."""
    folder = tmp_path_factory.mktemp("one")
    for name, (training, options, more) in trainings.runs({"one": trainings.ONE}).items():
        training(folder / name, trainings.settings(**options), **more)
    return folder


def facts(folder: Path) -> dict:
    return json.loads((folder / "facts.json").read_text())


def assert_close(found: Path, expected: Path, loss: float = LOSS, weight: float = WEIGHT) -> None:
    told, wanted = facts(found), facts(expected)
    assert told["losses"] == pytest.approx(wanted["losses"], rel=loss)
    assert told["tokens"] == wanted["tokens"]
    ours, theirs = (load_file(folder / "state.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        torch.testing.assert_close(ours[name], value, rtol=0, atol=weight, msg=name)


@pytest.mark.parametrize("kind", ["adapter", "memory", "spliced", "units", "sae", "relu"])
@pytest.mark.parametrize("strategy", trainings.STRATEGIES)
def test_two_ranks_train_what_one_process_does(kind, strategy, one, two):
    assert_close(two / f"{kind} {strategy}", one / f"{kind} one")


@pytest.mark.parametrize("strategy", trainings.STRATEGIES)
def test_two_ranks_keep_the_weights_that_one_process_does(strategy, one, two):
    """Of the lowest loss on what is set aside, which three batches cannot be shared evenly for."""
    told, wanted = two / f"followed {strategy}", one / "followed one"
    ours, theirs = (facts(folder)["history"] for folder in (told, wanted))
    assert [entry["step"] for entry in ours] == [0, 2, 4, 6, 8]
    losses = [entry["loss"] for entry in theirs]
    assert [entry["loss"] for entry in ours] == pytest.approx(losses, rel=LOSS)
    assert losses.index(min(losses)) < len(losses) - 1
    assert_close(told, wanted)


@pytest.mark.parametrize("kind", ["base", "batch_topk", "end_to_end"])
def test_two_ranks_with_whole_weights_train_as_one_process_does(kind, one, two):
    """BatchTopK selects among the tokens of both; end to end, they have unlike numbers of them."""
    assert_close(two / f"{kind} ddp", one / f"{kind} one")


@pytest.mark.parametrize("strategy", trainings.STRATEGIES)
def test_parts_taken_in_turn_add_up(strategy, one, two):
    """Two ranks, two parts each, against one process with two parts: four against two."""
    told, wanted = two / f"accumulated {strategy}", one / "accumulated one"
    assert len(facts(told)["losses"]) == len(facts(wanted)["losses"]) == 2 * trainings.STEPS
    ours, theirs = (load_file(folder / "state.safetensors") for folder in (told, wanted))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=WEIGHT, msg=name)


@pytest.mark.parametrize("name", trainings.ECONOMIES)
def test_saving_memory_changes_nothing(name, one, two):
    assert_close(two / f"adapter {name}", one / "adapter one")


@pytest.mark.parametrize("strategy", trainings.STRATEGIES)
def test_autocast_is_the_same_under_every_strategy(strategy, one, two):
    told, wanted = facts(two / f"autocast {strategy}"), facts(one / "autocast one")
    assert told["losses"] == pytest.approx(wanted["losses"], rel=AUTOCAST)
    assert told["losses"] != pytest.approx(facts(one / "adapter one")["losses"], rel=LOSS)
    weights = load_file(two / f"autocast {strategy}" / "state.safetensors")
    assert all(w.dtype != torch.bfloat16 for w in weights.values())


def test_memory_policies_of_all_ranks_decide_as_one(one, two):
    wanted = facts(one / "memory one")["events"]
    assert {"spawn", "merge"} <= set(wanted)
    for strategy in trainings.STRATEGIES:
        assert facts(two / f"memory {strategy}")["events"] == wanted


def test_zero_really_shards_and_offloads(two):
    assert facts(two / "adapter zero3")["sharded"] > 0
    assert facts(two / "adapter zero3")["persistent"] == 0
    assert facts(two / "adapter persistent")["sharded"] == 0
    assert facts(two / "adapter persistent")["persistent"] > 0
    assert not facts(two / "adapter zero2")["offloaded"]
    assert facts(two / "adapter offload")["offloaded"]
    assert facts(two / "adapter offload of weights")["offloaded"]


@pytest.mark.parametrize("strategy", trainings.STRATEGIES)
def test_the_exported_adapter_is_the_file_of_one_process(strategy, one, two):
    ours, theirs = two / f"adapter {strategy}" / "adapter", one / "adapter one" / "adapter"
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    config = "adapter_config.json"
    assert (ours / config).read_text() == (theirs / config).read_text()
    files = [load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs)]
    assert files[0].keys() == files[1].keys()
    assert all(tensor.numel() for tensor in files[0].values())
    sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in (ours, theirs)]
    assert sizes[0] == sizes[1]


def test_one_process_under_zero_needs_no_launcher(start, root, unbroken):
    zero3 = ("trainer.strategy=zero3", "trainer.persistent_elements=0")
    start(ADAPTER, *zero3, f"artifacts.root={root}").ends_well()
    runs.assert_close(runs.weights(root), unbroken)


def test_a_sequence_of_two_ranks_forgets_what_one_process_does(start, root, tmp_path):
    """Every score, what the memory policy did on the way, and the adapters; under ZeRO-3."""
    aside = Path(shutil.copytree(root, tmp_path / "aside"))
    sequence = ("stage=sequential_forgetting", "method.replay.ratio=0.5", *MEMORY)
    zero3 = ("trainer.strategy=zero3", "trainer.persistent_elements=0")
    pair = start.ranks(*sequence, *zero3, f"artifacts.root={root}", slow_end=True)
    assert [run.wait() for run in pair] == [0, 0], pair[0].err
    start(*sequence, f"artifacts.root={aside}").ends_well()
    ours, theirs = (
        (trained(where, "sequential_forgetting")[0].parent / "sequential.json").read_text()
        for where in (root, aside)
    )
    assert ours == theirs
    ours, theirs = (
        {name: tensor for name, tensor in found.items() if WEIGHTS in name}
        for found in (runs.weights(where, "sequential_forgetting") for where in (root, aside))
    )
    assert len({name.split(":")[0] for name in ours}) == 5
    runs.assert_close(ours, theirs)
