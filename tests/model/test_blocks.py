"""Which lists of a network are its transformer blocks, whatever their lengths."""

import pytest
import torch
from torch import nn

from gradindex.errors import InputError
from gradindex.model.blocks import find_blocks
from gradindex.model.probe import probe
from gradindex.model.tracked import parameter_share, tracked_modules, untracked
from support.families import CHANGES, small_network
from support.models import random_network


def test_a_tower_of_equally_many_layers_is_none():
    """The vision tower stands first; its layers, like the text's, are three."""
    network = small_network("gemma3")
    tower = network.model.vision_tower.encoder.layers
    assert len(tower) == len(network.model.language_model.layers) == 3
    modules = tracked_modules(network, "mlp,attention")
    assert {name.name.rpartition(".layers.")[0] for name in modules} == {"model.language_model"}
    left = untracked(network, modules)
    assert set(left) == {"head", "norms", "parts that a short text doesn't run"}
    unseen = sum(p.numel() for name, p in network.named_parameters()
                 if name.startswith(("model.vision_tower.", "model.multi_modal_projector.")))
    every = sum(p.numel() for p in network.parameters())
    # the projector is a part of its own, whose only parameters are its norm's and a bare matrix
    assert left["parts that a short text doesn't run"] == pytest.approx(unseen / every)
    assert sum(left.values()) + parameter_share(network, modules) == pytest.approx(1)


@pytest.mark.parametrize("layers", [1, 2])
def test_lists_inside_blocks_are_none(layers, monkeypatch):
    """LongCat has two attentions and two MLPs in each block, in lists."""
    monkeypatch.setitem(CHANGES, "longcat_flash",
                        {"num_layers": layers, "num_hidden_layers": 2 * layers})
    network = small_network("longcat_flash")
    assert len(network.model.layers) == layers
    modules = tracked_modules(network, "mlp,attention")
    assert {module.layer for module in modules} == {*range(layers)}
    for module in modules:
        assert module.name.startswith(f"model.layers.{module.layer}.")
        assert (module.kind == "attention") == (".self_attn." in module.name)


def test_lists_that_take_turns_are_the_same_layers():
    """XLM keeps its attentions in one list and its MLPs in another."""
    modules = tracked_modules(small_network("xlm"), "mlp,attention")
    for module in modules:
        assert module.name.split(".")[2] == str(module.layer)
        assert (module.kind == "attention") == (".attentions." in module.name)
    assert {module.kind for module in modules} == {"attention", "mlp"}


def test_lists_that_follow_each_other_are_numbered_on():
    modules = tracked_modules(small_network("hrm_text"))
    first = {module.layer for module in modules if ".L_module." in module.name}
    second = {module.layer for module in modules if ".H_module." in module.name}
    assert (first, second) == ({0, 1, 2}, {3, 4, 5})


def heads_beside(network):
    """Further heads in a list of as many as the layers, that a pass doesn't run."""
    network.heads = nn.ModuleList(
        nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 37))) for _ in range(2))
    network.heads.double()


def test_heads_that_do_not_run_are_named():
    network = random_network("gpt_neox")
    names = [module.name for module in tracked_modules(network, "mlp,attention")]
    heads_beside(network)
    modules = tracked_modules(network, "mlp,attention")
    assert [module.name for module in modules] == names
    extra = 2 * (12 * 13 + 37 * 13)
    assert untracked(network, modules)["parts that a short text doesn't run"] == pytest.approx(
        extra / sum(p.numel() for p in network.parameters()))


def test_a_block_that_does_not_run_keeps_its_number():
    """As of a list that ends with a layer for further tokens."""
    network = random_network("gpt_neox", num_hidden_layers=3)
    layers = network.gpt_neox.layers
    layers[0].forward = lambda hidden_states, **_: hidden_states
    assert {module.layer for module in tracked_modules(network)} == {1, 2}
    assert "parts that a short text doesn't run" in untracked(network, tracked_modules(network))


class Nested(nn.Module):
    """Blocks that are lists of their parts, among a network's parts by name; maps in a list."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({
            "embed": nn.Embedding(7, 3),
            "blocks": nn.ModuleList(nn.ModuleList([
                nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Sequential(nn.Linear(3, 3))])
                for _ in range(2)),
            "mix": nn.ModuleList(nn.Linear(3, 3) for _ in range(2)),
        })


def test_lists_of_lists_and_lists_of_maps():
    network = Nested()
    blocks = find_blocks(network, list(network.modules()))
    assert [(block.name, block.layer) for block in blocks] == [
        ("parts.blocks.0", 0), ("parts.blocks.1", 1)]


def test_a_network_without_blocks_is_refused():
    with pytest.raises(InputError, match="Linear has no list of transformer blocks that run when"):
        find_blocks(nn.Linear(2, 2), [])


def test_without_weights_every_list_counts():
    """On "meta" nothing runs: the order is the network's own."""
    with torch.device("meta"):
        network = small_network("gpt_neox")
    found = probe(network, [])
    assert not found.left_out
    assert [block.name for block in find_blocks(network, found.called)] == [
        f"gpt_neox.layers.{layer}" for layer in range(3)]
