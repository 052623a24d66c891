"""The pool of past policies."""

import collections

import numpy as np
import pytest
import torch
from torch import nn

from seppo_fast.references import ReferencePool
from seppo_fast.references.layout import PackedLayout, trainable_state_dict
from seppo_fast.references.tiers import Budget
from seppo_fast.utils.errors import CheckpointError
from tests.helpers.pools import KEPT, Odd, assert_holds, contents, filled, same, scrambled

SLAB = PackedLayout.of(Odd()).size
TIERS = {"host": Budget(host=9 * SLAB), "disk": Budget(host=0)}


def weight_of(value, size=1):
    layer = nn.Linear(size, size, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def filled_with_numbers(count, seed=0, **settings):
    """Returns a pool of `count` checkpoints, each of one weight that equals the checkpoint's number."""
    pool = ReferencePool(seed, **settings)
    for number in range(count):
        pool.add(weight_of(float(number)))
    return pool


@pytest.fixture(params=TIERS)
def pool_of_odd(request, tmp_path):
    pool, expected = filled(3, budget=TIERS[request.param], folder=tmp_path)
    assert set(pool.tiers.values()) == {request.param}
    yield pool, expected
    pool.close()


def test_checkpoints_are_copies_and_come_back_bit_for_bit(pool_of_odd):
    pool, expected = pool_of_odd
    assert list(expected) == [0, 1, 2] and len(pool) == 3
    assert_holds(pool, expected)
    module = Odd()
    layouts = {name: tensor.stride() for name, tensor in module.named_parameters()}
    places = {name: tensor.data_ptr() for name, tensor in module.named_parameters()}
    for index in (2, 0, 1, 0):
        pool.load_into(module, index)
        assert same(module, expected[index])
    assert {name: tensor.stride() for name, tensor in module.named_parameters()} == layouts
    assert {name: tensor.data_ptr() for name, tensor in module.named_parameters()} == places


def test_what_is_frozen_or_not_saved_is_left_alone(pool_of_odd):
    pool, _ = pool_of_odd
    module = Odd()
    own = scrambled(module, 9)
    pool.load_into(module, 1)
    assert same(module, own, ("frozen", "scratch"))
    with pool.resident(module, 0):
        assert same(module, own, ("frozen", "scratch"))


def test_a_policy_is_a_reference_in_the_block_and_itself_after_it(pool_of_odd):
    """Its tensors are the same objects at the same addresses, tied as before."""
    pool, expected = pool_of_odd
    policy = Odd()
    own = scrambled(policy, 9)
    tensors, version = trainable_state_dict(policy), policy.fp64._version
    places = {name: (tensor.data_ptr(), tensor.stride(), tensor.dtype) for name, tensor in tensors.items()}
    for index in (1, 1, 0, 2):
        with pool.resident(policy, index) as reference:
            assert reference is policy
            assert same(policy, expected[index])
            assert policy.head.weight is policy.embedding.weight
            assert policy.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert same(policy, own, (*KEPT, "frozen", "scratch"))
        after = trainable_state_dict(policy)
        assert all(after[name] is tensor for name, tensor in tensors.items())
        assert {name: (tensor.data_ptr(), tensor.stride(), tensor.dtype) for name, tensor in after.items()} == places
    assert policy.fp64._version == version  # nothing was written


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_policy_comes_back_after_an_error(compute):
    policy, pool = weight_of(1.0, 3), ReferencePool(0, compute=compute)
    pool.add(policy)
    own = scrambled(policy, 9)
    for index in (0, 1):  # inside the block, and on the way into it
        with pytest.raises(ValueError), pool.resident(policy, index):
            raise ValueError
        assert same(policy, own, ("weight",))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_training_goes_on_as_if_there_had_been_no_reference(compute):
    """Gradients are the same, and the hooks by which distributed training reduces them still fire."""
    policy, pool, fired = weight_of(1.0, 3), ReferencePool(0, compute=compute), []
    pool.add(policy)
    x = torch.arange(6.0).view(2, 3)
    policy(x).sum().backward()
    expected = policy.weight.grad.clone()
    accumulator = policy.weight.expand_as(policy.weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *_: fired.append("accumulated"))
    policy.weight.register_post_accumulate_grad_hook(lambda _: fired.append("after"))
    with pool.resident(policy, 0), torch.autocast("cpu", compute, enabled=compute != torch.float32):
        policy(x).detach()
    policy(x).sum().backward()
    assert torch.equal(policy.weight.grad, 2 * expected)
    assert sorted(fired) == ["accumulated", "after"]


def test_what_runs_in_the_block_changes_no_checkpoint():
    """Batch norm updates its statistics in its forward."""
    module = nn.BatchNorm1d(3)
    with ReferencePool(0) as pool:
        pool.add(module)
        before, names = contents(module), tuple(trainable_state_dict(module))
        for _ in range(2):
            with pool.resident(module, 0):
                assert same(module, before, names)
                module(torch.arange(12.0).view(4, 3))
        assert same(module, before, names)
        pool.bind(module)
        for _ in range(2):
            pool.load_into(module, 0)
            assert same(module, before, names)
            module(torch.arange(12.0).view(4, 3))


def test_a_bound_module_is_the_checkpoint_that_was_loaded(pool_of_odd):
    pool, expected = pool_of_odd
    module = Odd()
    own = scrambled(module, 9)
    pool.bind(module)
    assert module.head.weight is module.embedding.weight
    for index in (1, 0, 0, 2):
        pool.load_into(module, index)
        assert same(module, expected[index])
        assert same(module, own, ("frozen", "scratch"))


def test_an_expanded_parameter_can_be_a_reference():
    policy, pool = nn.Module(), ReferencePool(0)
    policy.wide = nn.Parameter(torch.arange(3.0).expand(4, 3))
    pool.add(policy)
    policy.wide.data = torch.zeros(1, 3).expand(4, 3)
    with pool.resident(policy, 0):
        assert torch.equal(policy.wide, torch.arange(3.0).expand(4, 3))
    assert torch.equal(policy.wide, torch.zeros(4, 3)) and policy.wide.stride() == (0, 1)


@pytest.mark.parametrize(("draw", "expected"), [("initial", {0}), ("newest", {4})])
def test_fixed_draws(draw, expected):
    pool = filled_with_numbers(5, draw=draw)
    assert {pool.draw(number) for number in range(50)} == expected


def test_uniform_draws_are_uniform_and_keyed():
    pools = [filled_with_numbers(5, seed) for seed in (0, 0, 1)]
    draws = [[pool.draw(number) for number in range(2000)] for pool in pools]
    assert draws[0] == draws[1] != draws[2]
    counts = collections.Counter(draws[0])
    assert sum((counts[index] - 400) ** 2 / 400 for index in range(5)) < 18.5  # p = 0.001, 4 degrees of freedom


def test_draws_are_uniform_over_seeds_too():
    pool, counts = filled_with_numbers(5), collections.Counter()
    for seed in range(2000):
        pool._seed = seed
        counts[pool.draw(3)] += 1
    assert sum((counts[index] - 400) ** 2 / 400 for index in range(5)) < 18.5


def test_draws_depend_on_what_is_kept_and_not_on_where(tmp_path):
    size = PackedLayout.of(weight_of(0.0)).size
    pools = [
        filled_with_numbers(9, keep=4, budget=Budget(host=host * size), folder=tmp_path) for host in (0, 2, 9)
    ]  # fmt: skip
    assert len({tuple(pool.tiers.values()) for pool in pools}) == 3
    assert len({tuple(pool.draw(number) for number in range(100)) for pool in pools}) == 1


def test_a_draw_is_known_before_its_pool_has_grown():
    pool = filled_with_numbers(1)
    for number in range(40):
        guess = pool.draw(number, len(pool) + 1)
        pool.add(weight_of(0.0))
        assert pool.draw(number) == guess


@pytest.mark.parametrize("rule", ["newest", "spread", "reservoir"])
def test_a_bounded_pool_draws_the_initial_policy_as_often_as_an_unbounded_one(rule):
    """It gets 1/k of the draws, and the others share the rest evenly."""
    checkpoints, keep, draws = 12, 4, 6000
    pool = filled_with_numbers(checkpoints, keep=keep, rule=rule)
    counts = collections.Counter(pool.draw(number) for number in range(draws))
    share = draws / checkpoints
    expected = {number: share * (checkpoints - 1) / (keep - 1) if number else share for number in pool.tiers}
    assert set(counts) == set(expected) and len(expected) == keep
    assert sum((counts[one] - often) ** 2 / often for one, often in expected.items()) < 16.3  # p = 0.001, 3 degrees


def test_a_reservoir_draws_every_past_policy_as_often_as_an_unbounded_pool():
    """One draw from each of 1200 pools, including policies that most of them have dropped."""
    checkpoints, seeds, counts, layer = 10, 1200, collections.Counter(), weight_of(0.0)
    for seed in range(seeds):
        pool = ReferencePool(seed, keep=4)
        for _ in range(checkpoints):
            pool.add(layer)
        index = pool.draw(7)
        assert index in pool.tiers
        counts[index] += 1
    often = seeds / checkpoints
    assert sum((counts[one] - often) ** 2 / often for one in range(checkpoints)) < 27.9  # p = 0.001, 9 degrees


@pytest.mark.parametrize("rule", ["newest", "spread", "reservoir"])
def test_a_bounded_pool_holds_the_right_policies(rule):
    pool, layer = filled_with_numbers(30, keep=5, rule=rule), weight_of(-1.0)
    assert len(pool) == 30 and len(pool.tiers) == 5 and 0 in pool.tiers
    for number in pool.tiers:
        pool.load_into(layer, number)
        assert layer.weight.item() == number
    (dropped, *_) = set(range(30)) - set(pool.tiers)
    with pytest.raises(ValueError, match=f"index: {dropped} is not one of the kept checkpoints, .0, "):
        pool.load_into(layer, dropped)


def test_an_empty_pool_says_so(tmp_path):
    pool, module = ReferencePool(0), weight_of(0.0)
    calls = [lambda: pool.draw(0), lambda: pool.bind(module), lambda: pool.load_into(module, 0)]
    calls += [lambda: pool.save(tmp_path / "pool"), lambda: pool.resident(module, 0).__enter__()]
    for call, words in zip(calls, ["checkpoint 0", "checkpoint 0", "index: 0", "empty", "index: 0"], strict=True):
        with pytest.raises(ValueError, match=words):
            call()
    assert pool.tiers == {} and len(pool) == 0


def test_a_module_that_does_not_match_is_described_and_changes_nothing():
    pool, expected = filled(2)
    with pool:
        other = nn.Linear(3, 2)
        own = scrambled(other, 0)
        calls = [pool.add, pool.bind, lambda module: pool.load_into(module, 0)]
        for call in [*calls, lambda module: pool.resident(module, 0).__enter__()]:
            with pytest.raises(ValueError, match=r"module: (?s:.*)fp16: \(7,\) is not in the module"):
                call(other)
        assert same(other, own, ("weight", "bias"))
        assert len(pool) == 2
        assert_holds(pool, expected)


WRONG_SETTINGS = [{"keep": 1}, {"keep": 0}, {"rule": "oldest", "keep": 2}, {"draw": "any"}]


@pytest.mark.parametrize("settings", WRONG_SETTINGS, ids=str)
def test_settings_that_are_none_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ReferencePool(0, **settings)


def test_a_module_without_trained_tensors_is_an_error():
    with pytest.raises(ValueError, match="module: "):
        ReferencePool(0).add(weight_of(0.0).requires_grad_(False))


WRONG_USE = {
    "a block within a block": lambda pool, policy: pool.resident(policy, 1).__enter__(),
    "the policy is loaded": lambda pool, policy: pool.load_into(policy, 1),
    "the reference is added": lambda pool, policy: pool.add(policy),
}


@pytest.mark.parametrize("use", WRONG_USE.values(), ids=WRONG_USE.keys())
def test_the_policy_cannot_be_used_otherwise_while_it_is_a_reference(use):
    """Each would silently replace the reference's weights, or store the reference's weights as the policy's."""
    pool, policy = filled_with_numbers(2), weight_of(9.0)
    with pool.resident(policy, 0):
        with pytest.raises(ValueError, match="resident"):
            use(pool, policy)
        assert policy.weight.item() == 0
    assert policy.weight.item() == 9 and len(pool) == 2


def test_one_module_is_bound():
    pool, first, second = filled_with_numbers(2), weight_of(9.0), weight_of(9.0)
    pool.bind(first)
    pool.bind(first)
    with pytest.raises(ValueError, match="bound"):
        pool.bind(second)
    assert second.weight.item() == 9


def test_a_bound_module_is_not_loaded_while_another_is_a_reference():
    """Both are views of the same slab."""
    pool, policy, bound = filled_with_numbers(2), weight_of(9.0), weight_of(9.0)
    pool.bind(bound)
    with pool.resident(policy, 0):
        with pytest.raises(ValueError, match="resident"):
            pool.load_into(bound, 1)
        assert policy.weight.item() == 0


def test_one_autocast_around_two_references_serves_each_its_own_weights():
    """Autocast keeps the casts of float32 parameters until its block ends."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
            self.head.weight = self.embedding.weight  # so it is kept in float32

        def forward(self, x):
            return self.head(x)

    module, pool, found = Tied(), ReferencePool(0, compute=torch.bfloat16), []
    for value in (1.0, 2.0):
        nn.init.constant_(module.head.weight, value)
        pool.add(module)
    with torch.autocast("cpu", torch.bfloat16):
        for index in (0, 1, 0):
            with pool.resident(module, index):
                found.append(module(torch.ones(1, 4)).unique().tolist())
    assert found == [[4.0], [8.0], [4.0]]


def test_one_autocast_around_two_loads_serves_each_its_own_weights():
    module, pool, found = weight_of(1.0), filled_with_numbers(3), []
    with torch.autocast("cpu", torch.bfloat16):
        for index in (1, 2):
            pool.load_into(module, index)
            found.append(module(torch.ones(1, 1)).item())
    assert found == [1.0, 2.0]


def test_what_a_pool_was_saved_by_must_be_what_restores_it(tmp_path):
    filled_with_numbers(3, keep=2).save(tmp_path / "pool")
    for settings, words in (({"keep": 3}, "keep = 2, not 3"), ({"keep": 2, "rule": "spread"}, "rule = 'reservoir'")):
        pool = ReferencePool(0, **settings)
        with pytest.raises(CheckpointError, match=words):
            pool.restore(tmp_path / "pool", torch.device("cpu"))
        assert len(pool) == 0
    whole = filled_with_numbers(1)
    with pytest.raises(ValueError, match="only an empty pool"):
        whole.restore(tmp_path / "pool", torch.device("cpu"))


def test_numbers_of_numpy_are_numbers(tmp_path):
    budget = Budget(host=np.int64(10**6))
    with ReferencePool(np.int64(7), keep=np.int64(2), budget=budget) as pool, ReferencePool(7, keep=2) as plain:
        module = nn.Linear(2, 3)
        for _ in range(6):
            pool.add(module)
            plain.add(module)
        assert pool.tiers == plain.tiers and len(pool.tiers) == 2
        assert [pool.draw(np.int64(number)) for number in range(20)] == [plain.draw(number) for number in range(20)]
        pool.save(tmp_path / "pool")
    with ReferencePool(7, keep=2) as plain:
        plain.restore(tmp_path / "pool", "cpu")


def test_the_pool_has_two_public_places():
    import seppo_fast
    import seppo_fast.references

    assert seppo_fast.ReferencePool is seppo_fast.references.ReferencePool is ReferencePool
    with pytest.raises(AttributeError, match="no attribute 'ReferencePools'"):
        _ = seppo_fast.ReferencePools
