"""Swapping a module's tensors for others, and back."""

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from seppo_fast.references.layout import trainable_state_dict
from seppo_fast.references.swap import offload, reload, restore_parameters, swap_parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, rows):
        return self.head(self.embedding(rows)) * self.scale


def test_every_place_of_a_tied_tensor_has_the_other_one_and_all_come_back():
    module, rows = Tied(), torch.tensor([0, 3])
    own, expected = trainable_state_dict(module), module(rows)
    others = {
        name: (nn.Parameter if isinstance(x, nn.Parameter) else lambda y: y)(x.detach() + 1) for name, x in own.items()
    }
    places = swap_parameters(module, own, others)
    assert module.head.weight is module.embedding.weight is others["embedding.weight"]
    by_hand = (others["embedding.weight"][rows] @ others["embedding.weight"].T + others["head.bias"]) * 3.0
    torch.testing.assert_close(module(rows), by_hand)
    module.scale = module.scale + 1  # reassigned in the meantime
    restore_parameters(places)
    assert all(trainable_state_dict(module)[name] is tensor for name, tensor in own.items())
    assert torch.equal(module(rows), expected)


def test_memory_of_what_is_put_aside_is_given_back():
    whole = torch.arange(12.0)
    tensors = {"own": nn.Parameter(torch.randn(3, 5, 2, 2).to(memory_format=torch.channels_last)), "part": whole[3:9]}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    copies = offload(tensors, torch.device("cpu"))
    assert set(copies) == {"own"}  # the other shares its memory
    assert tensors["own"].untyped_storage().nbytes() == 0 and torch.equal(tensors["part"], before["part"])
    reload(tensors, copies)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert tensors["own"].stride() == before["own"].stride()


def test_a_mapped_file_is_not_put_aside(tmp_path):
    save_file({"own": torch.ones(5)}, tmp_path / "weights.safetensors")
    tensors = load_file(tmp_path / "weights.safetensors")
    assert offload(tensors, torch.device("cpu")) == {}
    assert torch.equal(tensors["own"], torch.ones(5))
