"""Policy and reference in one forward, for LoRA: `reference.errors = together`.

Two LoRAs of one base differ in their adapters alone. So one batch holds rows of both: each base layer takes all rows at
once, each half passes through its own adapter, and attention runs over the whole batch. Left to autograd that costs
more than two forwards, because it keeps the reference's activations too and sends zeros back through them. Here each
block of the network runs on all rows without a graph, keeps a copy of its inputs' policy rows, and runs those alone
once more, with a graph, when their gradient arrives: gradient checkpointing with the block as its unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from seppo_fast.models.family import JointParts
from seppo_fast.models.recompute import without_recomputation
from seppo_fast.models.trainable import LORA_LAYER, LORA_LINEAR, trainable


class JointModel:
    """Lets a policy's forward take rows of the policy and rows of a reference at once.

    Each half of the prediction is what a forward of its own gives, bit for bit where a layer's products do not depend
    on the size of the batch. The policy's half has the gradient of that forward, the reference's half has none. Until
    the backward the policy's rows of each block's inputs are kept, nothing else. Gradient checkpointing inside the
    blocks is off while they run again: it would run most of them a third time.

    Args:
        policy: the network that is trained, in eval mode, with LoRA layers in its blocks.
        reference: a module of the same structure that holds the policy's frozen parameters themselves, not copies,
            and adapters of its own, which may be written in place between forwards.
        parts: those of the policy; see `Family.joint_parts`.

    Raises:
        ValueError: weights other than a LoRA's are trained, a LoRA layer is of another kind than `make_trainable` adds
            or lies outside the blocks, or a frozen parameter is not shared.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module, parts: JointParts) -> None:
        theirs = dict(reference.named_modules())
        layers = {ours: theirs.get(name) for name, ours in policy.named_modules() if isinstance(ours, LORA_LAYER)}
        _check(policy, reference, parts.blocks, layers)
        self._policy = policy
        units = [_Unit(block.forward, [block], layers, parts.row_layers) for block in parts.blocks]
        self._units = dict(zip(parts.blocks, units, strict=True))
        tail = parts.tail
        run = _chain([part.forward for part in tail])
        self._units[tail[-1]] = _Unit(run, tail, layers, parts.row_layers)
        self._passed = tail[:-1]  # the last one runs them all
        inside = {part for unit in self._units.values() for part in unit.parts}
        self._row_layers = [layer for layer in parts.row_layers if layer not in inside]

    @contextmanager
    def rows(self, policy_rows: int) -> Iterator[None]:
        """Inside, the policy's forward takes `policy_rows` rows of the policy and then rows of the reference.

        Outside, it is what it was; the backward may come there. A wrapper around the policy, such as
        DistributedDataParallel, is called as ever.

        Args:
            policy_rows: how many rows of the batch, counted from its start, are the policy's.

        Raises:
            ValueError: the policy is in training mode, or a half has no rows (the reference's: raised by the forward).
        """
        if policy_rows < 1:
            raise ValueError(f"policy_rows = {policy_rows} must be at least 1")
        if self._policy.training:
            raise ValueError("policy: in training mode a block that runs again would draw other dropout; call eval()")
        rows = _Rows(policy_rows)
        forwards: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(self._passed, _identity)
        forwards |= {layer: _halved(layer, rows) for layer in self._row_layers}
        forwards |= {module: partial(_run, unit, rows) for module, unit in self._units.items()}
        with ExitStack() as stack:
            stack.callback(self._policy.register_forward_pre_hook(rows.count, with_kwargs=True).remove)
            stack.enter_context(_replaced(forwards))
            yield


def _check(
    policy: nn.Module, reference: nn.Module, blocks: Iterable[nn.Module], layers: Mapping[Any, nn.Module | None]
) -> None:
    """Raises a ValueError where policy and reference cannot share a forward; see `Together`."""
    adapters = {weight for layer in layers for weight in layer.parameters()}
    adapters -= {weight for layer in layers for weight in layer.get_base_layer().parameters()}
    full = [name for name, weight in trainable(policy).items() if weight not in adapters]
    if full:
        raise ValueError(
            f"policy: {len(full)} trained weights are no LoRA weights, {full[0]!r} the first of them. A forward can be "
            "shared where policy and reference share their base weights; with full weights every product is another. "
            "errors='ahead' needs no second network either: it makes the reference's errors before the updates"
        )
    inside = {part for block in blocks for part in block.modules()}
    if not all(_is_plain(ours) and _is_plain(theirs) and ours in inside for ours, theirs in layers.items()):
        raise ValueError(
            "policy, reference: each LoRA layer has to be a peft Linear in a down, mid or up block, with one adapter, "
            "active and not merged, and no variant such as DoRA"
        )
    of_reference = dict(reference.named_parameters())
    for name, weight in policy.named_parameters():
        if name not in of_reference or (weight not in adapters and weight is not of_reference[name]):
            raise ValueError(
                f"reference: its {name!r} is not the policy's own parameter; make the reference with "
                "copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad})"
            )


def _is_plain(layer: nn.Module | None) -> bool:
    return (
        isinstance(layer, LORA_LINEAR)
        and len(layer.active_adapters) == 1
        and not (layer.merged or layer.disable_adapters or layer.lora_variant)
    )


class _Rows:
    """Which rows are the policy's: the first of the batch, or the same part of a tensor with several rows for each."""

    def __init__(self, policy_rows: int) -> None:
        self._policy = policy_rows
        self._all = 0

    def count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learns the size of the batch, as a forward pre-hook of the network."""
        self._all = len(args[0] if args else kwargs["sample"])
        if self._policy >= self._all:
            raise ValueError(f"policy_rows = {self._policy} leaves the reference none of the batch's {self._all} rows")

    def policy(self, tensor: Tensor) -> int:
        """How many rows of a tensor are the policy's."""
        assert len(tensor) % self._all == 0
        return len(tensor) // self._all * self._policy


class _Unit:
    """What runs on all rows without a graph, and with one once more on the policy's: a block, or the tail.

    Args:
        run: its forward.
        modules: which it runs.
        layers: the reference's layer for each LoRA layer of the policy.
        row_layers: of the network, those within these modules among them.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        modules: Sequence[nn.Module],
        layers: Mapping[Any, Any],
        row_layers: Sequence[nn.Module],
    ) -> None:
        self.run = run
        self.parameters = [weight for module in modules for weight in trainable(module).values()]
        self.parts = [part for module in modules for part in module.modules()]
        self._layers = {part: layers[part] for part in self.parts if part in layers}
        inside = set(self.parts)
        self._row_layers = [layer for layer in row_layers if layer in inside]

    def shared(self, rows: _Rows) -> AbstractContextManager[None]:
        """Inside, its layers take rows of both."""
        forwards = {layer: _halved(layer, rows) for layer in self._row_layers}
        return _replaced(forwards | {ours: _adapted(ours, theirs, rows) for ours, theirs in self._layers.items()})

    def without_recomputation(self) -> AbstractContextManager[None]:
        """Inside, gradient checkpointing is off."""
        return without_recomputation(self.parts)


class _SharedForward(torch.autograd.Function):
    """Forward on all rows, backward on the policy's.

    The adapters are inputs, so that their gradients go where gradients go (DistributedDataParallel waits for them
    there), and are saved, so that autograd notices when one changes before the backward.
    """

    @staticmethod
    def forward(ctx: Any, unit: _Unit, rows: _Rows, run: Callable[..., Any], *inputs: Tensor) -> tuple[Any, ...]:
        tensors = inputs[: len(inputs) - len(unit.parameters)]
        ctx.unit, ctx.run, ctx.lengths = unit, run, [len(tensor) for tensor in tensors]
        # Copies: a slice would keep the reference's rows alive as well.
        ctx.save_for_backward(*(tensor[: rows.policy(tensor)].clone() for tensor in tensors), *unit.parameters)
        ctx.set_materialize_grads(False)
        with unit.shared(rows):
            outputs, refill = run(tensors)
        return refill, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors[: len(ctx.lengths)]
        needed = ctx.needs_input_grad[3:]
        with torch.enable_grad(), ctx.unit.without_recomputation():
            # Views: FlopCounterMode hangs hooks on them, which it cannot do on a leaf of `autograd.grad`.
            tensors = [tensor.detach().requires_grad_(need).view_as(tensor) for tensor, need in zip(kept, needed)]
            outputs, _ = ctx.run(tensors)
        ends = [(o, gradient) for o, gradient in zip(outputs, gradients) if gradient is not None and o.requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in ends],
            [source for source, need in zip([*tensors, *ctx.unit.parameters], needed) if need],
            [gradient[: len(output)] for output, gradient in ends],
            allow_unused=True,
        )
        rest = iter(found)
        result = [next(rest) if need else None for need in needed]
        padded = [_pad(gradient, length) for gradient, length in zip(result, ctx.lengths)]
        return None, None, None, *padded, *result[len(padded) :]


def _run(unit: _Unit, rows: _Rows, *args: Any, **kwargs: Any) -> Any:
    """A unit's forward on rows of both."""
    tensors, refill = _take_tensors((args, kwargs))
    device_type = tensors[0].device.type
    # The second run has to cast as the first did. No cache: an adapter is cast once a run, and what the first run cast
    # has no graph.
    autocast = partial(
        torch.autocast,
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )

    def run(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
        args, kwargs = refill(tensors)
        with autocast():
            return _take_tensors(unit.run(*args, **kwargs))

    refill_result, *outputs = _SharedForward.apply(unit, rows, run, *tensors, *unit.parameters)
    return refill_result(outputs)


def _adapted(ours: Any, theirs: Any, rows: _Rows) -> Callable[[Tensor], Tensor]:
    """A LoRA layer on rows of both: W x for all, and for each half + s B A x of its own, computed as peft does."""

    def forward(x: Tensor) -> Tensor:
        count = rows.policy(x)
        result = ours.base_layer(x)
        for layer, half in ((ours, slice(count)), (theirs, slice(count, None))):
            (name,) = layer.active_adapters
            lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
            result[half].add_(lora_b(lora_a(x[half].to(lora_a.weight.dtype))) * layer.scaling[name])
        return result

    return forward


def _halved(layer: nn.Module, rows: _Rows) -> Callable[[Tensor], Tensor]:
    """A layer on rows of both, one half after the other.

    For layers whose input has one row for each sample (time embeddings): a product of few rows is summed in another
    order than one of twice as many, and these cost next to nothing.
    """
    run = layer.forward

    def forward(x: Tensor) -> Tensor:
        count = rows.policy(x)
        return torch.cat([run(x[:count]), run(x[count:])])

    return forward


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these modules run other forwards; of this object only, its class keeps its own."""
    before = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module in forwards:
            del vars(module)["forward"]
        for module, forward in before.items():
            vars(module)["forward"] = forward


def _take_tensors(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Arguments or results as their tensors, each once, and a function that puts others in their place.

    A down block gives its hidden states twice, the second time as a residual; autograd is to see one output.
    """
    tensors: dict[int, Tensor] = {}

    def take(tensor: Tensor) -> _Slot:
        tensors[id(tensor)] = tensor
        return _Slot(list(tensors).index(id(tensor)))

    form = _map(tree, Tensor, take)
    return list(tensors.values()), lambda others: _map(form, _Slot, lambda slot: others[slot])


class _Slot(int):
    """Where a tensor stood: its place in the list."""


def _map(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dicts with `function` applied to what is of that kind."""
    if isinstance(tree, kind):
        return function(tree)
    if type(tree) in (tuple, list):
        return type(tree)(_map(branch, kind, function) for branch in tree)
    if type(tree) is dict:
        return {key: _map(branch, kind, function) for key, branch in tree.items()}
    return tree


def _pad(gradient: Tensor | None, length: int) -> Tensor | None:
    """The policy's gradient with the reference's after it, which is zero."""
    if gradient is None:
        return None
    return pad(gradient, [0, 0] * (gradient.dim() - 1) + [0, length - len(gradient)])


def _chain(functions: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def run(hidden: Tensor) -> Tensor:
        for function in functions:
            hidden = function(hidden)
        return hidden

    return run


def _identity(hidden: Tensor) -> Tensor:
    return hidden
