"""One forward for policy and reference, compared with two: values, gradients, FLOPs, bytes kept for the backward."""

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, silu
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from seppo_fast.config.schema import ModelConfig
from seppo_fast.methods.joint_forward import JointModel
from seppo_fast.models.trainable import make_trainable, trainable
from seppo_fast.models.unet import UNetFamily

TINY = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}

Batch = tuple[Tensor, Tensor, Tensor]


def tiny_policy(precision: str = "fp32", train: str = "lora", checkpointing: bool = False) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY)
    config = ModelConfig(train=train, lora_rank=4, precision=precision, gradient_checkpointing=checkpointing)
    make_trainable(unet, config, seed=0, family=UNetFamily)
    return unet


def reference_of(policy: UNet2DConditionModel) -> UNet2DConditionModel:
    shared = {id(weight): weight for weight in policy.parameters() if not weight.requires_grad}
    return copy.deepcopy(policy, shared).requires_grad_(False)


def models(precision: str = "fp32", checkpointing: bool = False) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """Returns a policy and a reference, each with large adapters of its own."""
    policy = tiny_policy(precision, checkpointing=checkpointing)
    reference = reference_of(policy)
    for unet in (policy, reference):
        for weight in adapters(unet).values():
            nn.init.normal_(weight, std=0.3)
    return policy, reference


def adapters(unet: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in unet.named_parameters() if "lora_" in name}


def make_batch(rows: int, size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    latents = torch.randn(rows, 4, *size, generator=generator)
    timesteps = torch.randint(0, 1000, (rows,), generator=generator)
    return latents.to(dtype), timesteps, torch.randn(rows, 7, 16, generator=generator).to(dtype)


def predict(unet: nn.Module, batch: Batch) -> Tensor:
    latents, timesteps, prompt_embeds = batch
    return unet(latents, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]


def together_of(policy, reference):
    return JointModel(policy, reference, UNetFamily.joint_parts(policy))


def one_pass(policy: nn.Module, together: JointModel, batch: Batch, rows: int) -> tuple[Tensor, Tensor]:
    with together.rows(rows):
        prediction = predict(policy, batch)
    return prediction[:rows], prediction[rows:]


def two_passes(policy: nn.Module, reference: nn.Module, batch: Batch, rows: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        theirs = predict(reference, tuple(part[rows:].clone() for part in batch))
    return predict(policy, tuple(part[:rows].clone() for part in batch)), theirs


def gradients(policy: nn.Module, prediction: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    """Returns the gradients of a randomly weighted sum times `scale`, and clears them on the policy."""
    weights = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(1))
    ((prediction * weights).sum() * scale).backward()
    return take_gradients(policy)


def take_gradients(policy: nn.Module) -> dict[str, Tensor]:
    taken = {name: weight.grad for name, weight in trainable(policy).items()}
    policy.zero_grad(set_to_none=True)
    assert all(gradient.abs().max() > 0 for gradient in taken.values())
    return taken


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Returns the largest difference, relative to the largest entry of its tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


class RowByRow(TorchFunctionMode):
    """Makes results independent of the batch size by computing one row at a time.

    That applies to products, whose order of summation depends on the batch size, and to functions whose last few
    elements are computed separately.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        with_rows = {linear: 1, torch.conv2d: 1, silu: 1, gelu: 1, scaled_dot_product_attention: 3}
        count = with_rows.get(function, 0)
        if not count:
            return function(*args, **(kwargs or {}))
        rows = zip(*(part.split(1) for part in args[:count]))
        return torch.cat([function(*row, *args[count:], **(kwargs or {})) for row in rows])


# Values


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_both_halves_are_bit_equal_to_two_passes(precision, pairs):
    # Latents of 4 x 8 x 8. The order of a float32 sum can depend on the batch size: here, a 3x3 convolution sums one
    # row in another order than two, and a 1x1 convolution of 16 channels sums 8 rows in another order than 16.
    policy, reference = models(precision)
    rows = 2 * pairs
    batch = make_batch(2 * rows)
    with autocast(precision):
        ours, theirs = one_pass(policy, together_of(policy, reference), batch, rows)
        expected = two_passes(policy, reference, batch, rows)
        other = predict(reference, tuple(part[:rows] for part in batch))
    assert ours.dtype == expected[0].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert torch.equal(ours, expected[0])
    assert torch.equal(theirs, expected[1])
    assert not torch.allclose(ours, other, rtol=1e-1, atol=1e-1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "total", "size"), [(1, 2, (8, 8)), (3, 5, (7, 9)), (8, 10, (5, 6))])
def test_halves_of_any_shape_are_bit_equal_where_products_do_not_depend_on_the_batch(precision, rows, total, size):
    policy, reference = models(precision)
    batch = make_batch(total, size)
    with autocast(precision), RowByRow():
        ours, theirs = one_pass(policy, together_of(policy, reference), batch, rows)
        expected = two_passes(policy, reference, batch, rows)
    assert torch.equal(ours, expected[0])
    assert torch.equal(theirs, expected[1])


@pytest.mark.parametrize(("rows", "total", "size"), [(1, 2, (8, 8)), (3, 5, (7, 9)), (8, 10, (5, 6))])
def test_halves_of_any_shape_are_close_to_two_passes(rows, total, size):
    policy, reference = models()
    batch = make_batch(total, size)
    halves = one_pass(policy, together_of(policy, reference), batch, rows)
    for half, expected in zip(halves, two_passes(policy, reference, batch, rows)):
        torch.testing.assert_close(half, expected, rtol=1e-5, atol=5e-6)


def test_scale_and_dtype_of_an_adapter_are_kept():
    # Without autocast, so that the layers themselves cast; a bfloat16 base, float32 adapters, and alpha / r is not 1.
    policy = UNet2DConditionModel(**TINY).requires_grad_(False).bfloat16().eval()
    policy.add_adapter(
        LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_out.0", "proj"], init_lora_weights=False)
    )
    for weight in adapters(policy).values():
        weight.data = weight.data.float()
    reference = reference_of(policy)
    for part in reference.modules():
        if isinstance(part, LoraLayer):
            part.scaling["default"] = -0.75
    batch = make_batch(4, dtype=torch.bfloat16)
    with RowByRow():
        halves = one_pass(policy, together_of(policy, reference), batch, 2)
        expected = two_passes(policy, reference, batch, 2)
    assert all(torch.equal(half, other) for half, other in zip(halves, expected))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_equal_weights_give_equal_halves(precision, pairs):
    policy, _ = models(precision)
    together = together_of(policy, reference_of(policy))
    twice = tuple(torch.cat([part, part]) for part in make_batch(2 * pairs))
    with autocast(precision):
        ours, theirs = one_pass(policy, together, twice, 2 * pairs)
    assert torch.equal(ours, theirs)


def test_weights_written_into_the_reference_are_used_at_once():
    policy, reference = models()
    together, batch = together_of(policy, reference), make_batch(4)
    first = one_pass(policy, together, batch, 2)[1]
    with torch.no_grad():
        for weight in adapters(reference).values():
            weight.mul_(-0.5)
    second = one_pass(policy, together, batch, 2)[1]
    assert not torch.allclose(first, second, rtol=1e-2, atol=1e-2)
    assert torch.equal(second, two_passes(policy, reference, batch, 2)[1])


def test_outside_rows_the_policy_is_what_it_was():
    policy, reference = models()
    batch = make_batch(4)
    before, gradient = predict(policy, batch), gradients(policy, predict(policy, batch))
    attributes = {name: set(vars(module)) for name, module in policy.named_modules()}
    together = together_of(policy, reference)
    one_pass(policy, together, batch, 2)
    with pytest.raises(ValueError, match="policy_rows = 4 leaves the reference none of the batch's 4 rows"):
        one_pass(policy, together, batch, 4)
    assert {name: set(vars(module)) for name, module in policy.named_modules()} == attributes
    assert not policy._forward_pre_hooks
    assert torch.equal(predict(policy, batch), before)
    assert distance(gradients(policy, predict(policy, batch)), gradient) == 0


# Gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("rows", "total", "size"), [(6, 12, (8, 8)), (3, 5, (7, 9))])
def test_gradients_are_those_of_two_passes(rows, total, size, checkpointing):
    policy, reference = (unet.double() for unet in models(checkpointing=checkpointing))
    together, batch = together_of(policy, reference), make_batch(total, size, torch.float64)
    expected = gradients(policy, two_passes(policy, reference, batch, rows)[0])
    assert distance(gradients(policy, one_pass(policy, together, batch, rows)[0]), expected) < 1e-10
    single = make_batch(total, size)
    policy, reference = policy.float(), reference_of(policy.float())
    ours = gradients(policy, one_pass(policy, together_of(policy, reference), single, rows)[0])
    assert distance({name: gradient.double() for name, gradient in ours.items()}, expected) < 1e-5


def test_the_reference_half_has_no_gradient():
    policy, reference = models()
    for weight in adapters(reference).values():
        weight.requires_grad_(True)
    batch = make_batch(5)
    batch[0].requires_grad_(True)
    expected = gradients(policy, two_passes(policy, reference, batch, 2)[0])
    of_latents, batch[0].grad = batch[0].grad, None
    ours, theirs = one_pass(policy, together_of(policy, reference), batch, 2)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
    (theirs * weights).sum().backward(retain_graph=True)
    assert all(weight.grad.abs().max() == 0 for weight in trainable(policy).values())
    policy.zero_grad(set_to_none=True)
    assert distance(gradients(policy, ours), expected) < 1e-5
    assert all(weight.grad is None for weight in reference.parameters())
    assert of_latents[:2].abs().max() > 0
    torch.testing.assert_close(batch[0].grad, of_latents, rtol=1e-4, atol=1e-4)
    assert batch[0].grad[2:].abs().max() == 0


def test_gradients_of_micro_batches_add_up():
    policy, reference = (unet.double() for unet in models())
    together = together_of(policy, reference)
    batches = {2: make_batch(4, dtype=torch.float64), 3: make_batch(5, (6, 10), torch.float64)}
    alone = [gradients(policy, two_passes(policy, reference, batch, rows)[0]) for rows, batch in batches.items()]
    expected = {name: alone[0][name] + alone[1][name] for name in alone[0]}
    # Both forwards before any backward: each has to remember its own rows.
    halves = [one_pass(policy, together, batch, rows)[0] for rows, batch in batches.items()]
    for half in halves:
        weights = torch.randn(half.shape, generator=torch.Generator().manual_seed(1))
        (half * weights).sum().backward()
    assert distance(take_gradients(policy), expected) < 1e-10


def test_mixed_precision_gradients_do_not_depend_on_where_the_backward_is():
    policy, reference = models("bf16")
    together, batch = together_of(policy, reference), make_batch(4)
    with autocast("bf16"):
        half = one_pass(policy, together, batch, 2)[0]
    outside = gradients(policy, half)
    assert all(gradient.dtype == torch.float32 for gradient in outside.values())
    with autocast("bf16"):
        predict(policy, batch)  # fills autocast's cache of weights
        inside = gradients(policy, one_pass(policy, together, batch, 2)[0])
        expected = gradients(policy, two_passes(policy, reference, batch, 2)[0])
    assert distance(inside, outside) == 0
    assert distance(outside, expected) < 0.05


def test_a_loss_scale_goes_through():
    policy, reference = models()
    together, batch = together_of(policy, reference), make_batch(4)
    plain = gradients(policy, one_pass(policy, together, batch, 2)[0])
    scaled = gradients(policy, one_pass(policy, together, batch, 2)[0], scale=2.0**16)
    assert all(torch.equal(scaled[name], plain[name] * 2**16) for name in plain)


def test_distributed_data_parallel_sees_every_gradient(tmp_path):
    policy, reference = models()
    batch = make_batch(4)
    expected = gradients(policy, two_passes(policy, reference, batch, 2)[0])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(policy)
        reduced = []
        wrapped.register_comm_hook(reduced, _note_bucket)
        together = together_of(policy, reference)
        for _ in range(2):  # the second forward fails if the first left out a gradient
            assert distance(gradients(policy, one_pass(wrapped, together, batch, 2)[0]), expected) < 1e-5
    finally:
        torch.distributed.destroy_process_group()
    assert sum(reduced) == 2 * sum(weight.numel() for weight in trainable(policy).values())


def _note_bucket(reduced: list[int], bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    reduced.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_an_adapter_changed_before_the_backward_is_noticed():
    policy, reference = models()
    half = one_pass(policy, together_of(policy, reference), make_batch(4), 2)[0]
    with torch.no_grad():
        next(iter(trainable(policy).values())).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        half.sum().backward()


# Cost, on the architecture of SD-1.5 at 512 x 512 in mixed precision: one pair, so two rows of each


def attention_flops(q: list[int], k: list[int], v: list[int], *_: object, out_shape: object, **__: object) -> int:
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(
    grad: list[int], q: list[int], k: list[int], v: list[int], *_: object, out_shape: object, **__: object
) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


FLOPS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(attention_flops),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(attention_backward_flops),
}


class Meter(TorchDispatchMode):
    """Counts FLOPs of operations on fake tensors, and tracks the storages that they created, autograd's included."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = 0
        self._given = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in given}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            return args[0].fake_device  # called by fake tensors more often than they compute
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in FLOPS:
            self.flops += FLOPS[function.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage.cdata not in self._given:
                    # Holding the weak reference keeps its address from being given to another storage.
                    self._made[storage.cdata] = storage, tensor.untyped_storage().nbytes()
        return result

    def alive(self) -> int:
        """Returns the bytes of the storages that are still alive."""
        return sum(size for storage, size in self._made.values() if not storage.expired())


def sd15(mode: FakeTensorMode) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """Returns a policy and a reference of fake tensors, which have shapes and dtypes but no memory or arithmetic."""
    with torch.device("meta"):
        policy = UNet2DConditionModel(cross_attention_dim=768)
        make_trainable(
            policy, ModelConfig(precision="bf16", lora_rank=8, gradient_checkpointing=True), seed=0, family=UNetFamily
        )
    reference = reference_of(policy)
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    with mode:
        for part in (*policy.modules(), *reference.modules()):
            for name, weight in part.named_parameters(recurse=False):
                if weight not in fakes:
                    fakes[weight] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
                setattr(part, name, fakes[weight])
    return policy, reference


def bytes_of(tree: object) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class Cost(NamedTuple):
    """FLOPs of the forward, of forward and backward, and bytes kept between them besides the prediction."""

    forward: int
    total: int
    kept: int


def cost(way: Callable[[], tuple[Tensor, Tensor]], given: Iterable[Tensor]) -> Cost:
    with Meter(given) as meter:
        with autocast("bf16"):
            ours, theirs = way()
        forward, kept = meter.flops, meter.alive() - bytes_of((ours, theirs))
        ours.float().sum().backward()
        return Cost(forward, meter.flops, kept)


@pytest.fixture(scope="module")
def costs() -> tuple[Cost, Cost, int]:
    """Costs of one forward, of two with gradient checkpointing, and the bytes of all inputs of the policy's blocks."""
    mode = FakeTensorMode()
    policy, reference = sd15(mode)
    with mode:
        batch = torch.empty(4, 4, 64, 64), torch.empty(4, dtype=torch.long), torch.empty(4, 77, 768)
        given = [*policy.parameters(), *reference.parameters(), *batch]
        together = together_of(policy, reference)
        one = cost(lambda: one_pass(policy, together, batch, 2), given)
        inputs = []
        for block in (*policy.down_blocks, policy.mid_block, *policy.up_blocks, policy.conv_norm_out):
            block.register_forward_pre_hook(lambda _, *given: inputs.append(bytes_of(given)), with_kwargs=True)
        two = cost(lambda: two_passes(policy, reference, batch, 2), given)
    return one, two, sum(inputs)


def test_flops_are_at_most_8_percent_above_two_passes(costs):
    one, two, _ = costs
    assert one.forward == two.forward == pytest.approx(4 * 0.803e12, rel=0.005)  # known for SD-1.5: all are counted
    assert one.total <= 1.08 * two.total


def test_bytes_kept_are_the_policy_rows_of_the_blocks_inputs(costs):
    one, two, inputs = costs
    assert one.kept == inputs
    assert one.kept <= 1.1 * two.kept


def test_a_flop_counter_sees_both_passes_of_a_block():
    # It registers hooks on the tensors that enter a module, also when a block reruns.
    policy, reference = models(checkpointing=True)
    together, batch = together_of(policy, reference), make_batch(4)
    counted = []
    for way in (lambda: one_pass(policy, together, batch, 2), lambda: two_passes(policy, reference, batch, 2)):
        with FlopCounterMode(display=False) as counter:
            ours = way()[0]
            forward = counter.get_total_flops()
            ours.sum().backward()
        counted.append((forward, counter.get_total_flops()))
    assert counted[0][0] == counted[1][0]
    assert counted[1][1] < counted[0][1] < 1.2 * counted[1][1]


# What cannot be shared


def test_full_weights_are_refused_with_the_way_out():
    policy = tiny_policy(train="full")
    said = "208 trained weights do not belong.*'conv_in.weight'.*reference.errors = ahead"
    with pytest.raises(ValueError, match=said):
        together_of(policy, copy.deepcopy(policy))


def test_a_base_that_is_not_shared_is_refused():
    policy = tiny_policy()
    with pytest.raises(ValueError, match="reference: its 'conv_in.weight' is not the policy's own parameter"):
        together_of(policy, copy.deepcopy(policy))


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["linear_1"]}, {"target_modules": ["conv1"]}, {"target_modules": ["to_q"], "use_dora": True}],
    ids=["outside the blocks", "convolution", "variant"],
)
def test_other_lora_layers_are_refused(settings):
    policy = UNet2DConditionModel(**TINY).requires_grad_(False).eval()
    policy.add_adapter(LoraConfig(r=2, **settings))
    with pytest.raises(ValueError, match="each LoRA layer must be a peft Linear in a down, mid or up block"):
        together_of(policy, reference_of(policy))


def test_a_disabled_adapter_is_refused():
    policy, reference = models()
    policy.disable_adapters()
    with pytest.raises(ValueError, match="with one adapter, active and not merged"):
        together_of(policy, reference)


@pytest.mark.parametrize("rows", [0, -1])
def test_a_policy_without_rows_is_refused(rows):
    together = together_of(*models())
    with pytest.raises(ValueError, match=f"policy_rows = {rows} must be at least 1"), together.rows(rows):
        pass


def test_a_policy_in_training_mode_is_refused():
    policy, reference = models()
    together = together_of(policy, reference)
    policy.train()
    with pytest.raises(ValueError, match="policy: in training mode"), together.rows(1):
        pass


# Clips: inside the network, each row of the batch becomes several rows, of frames or of places


def motion_models(checkpointing: bool) -> tuple[UNetMotionModel, UNetMotionModel]:
    torch.manual_seed(0)
    settings = {name: value for name, value in TINY.items() if not name.endswith(("types", "head_dim"))}
    policy = UNetMotionModel(
        **settings,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=2,
        motion_num_attention_heads=2,
    )
    make_trainable(
        policy,
        ModelConfig(lora_rank=2, precision="fp32", gradient_checkpointing=checkpointing),
        seed=0,
        family=UNetFamily,
    )
    reference = reference_of(policy)
    for weight in (*adapters(policy).values(), *adapters(reference).values()):
        nn.init.normal_(weight, std=0.3)
    return policy, reference


def clips(rows: int, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Batch:
    latents, timesteps, embeds = make_batch(rows, size, dtype)
    moving = torch.stack([latents, latents.flip(-1), 2 * latents], 2)
    return moving, timesteps, embeds.repeat_interleave(3, 0)


def predict_clips(unet: nn.Module, batch: Batch, rows: slice) -> Tensor:
    latents, timesteps, embeds = batch
    return predict(unet, (latents[rows], timesteps[rows], embeds.unflatten(0, (-1, 3))[rows].flatten(0, 1)))


def test_halves_of_clips_are_bit_equal_where_products_do_not_depend_on_the_batch():
    policy, reference = motion_models(checkpointing=False)
    together, batch = together_of(policy, reference), clips(3, (2, 2))
    with RowByRow(), torch.no_grad():
        ours, theirs = one_pass(policy, together, batch, 2)
        assert torch.equal(ours, predict_clips(policy, batch, slice(2)))
        assert torch.equal(theirs, predict_clips(reference, batch, slice(2, None)))
        assert not torch.allclose(theirs, predict_clips(policy, batch, slice(2, None)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("rows", "total"), [(1, 2), (2, 3)])
def test_gradients_of_clips_are_those_of_two_passes(rows, total, checkpointing):
    policy, reference = (unet.double() for unet in motion_models(checkpointing))
    together, batch = together_of(policy, reference), clips(total, (4, 6), torch.float64)
    expected = gradients(policy, predict_clips(policy, batch, slice(rows)))
    assert distance(gradients(policy, one_pass(policy, together, batch, rows)[0]), expected) < 1e-10
