"""One forward for policy and reference, for LoRA: `reference.errors = together`.

Two LoRAs on one base differ in their adapters alone. So one batch can hold rows of both: each base layer processes all
rows at once, each half passes through its own adapter, and attention runs over the whole batch. With plain autograd
this costs more than two forwards, because autograd also keeps the reference's activations and sends zeros back through
them. Here each block of the network runs on all rows without a graph and keeps a copy of the policy's rows of its
inputs. When their gradient arrives, it reruns these rows alone, with a graph: gradient checkpointing with the block as
its unit.
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
    """Lets a policy's forward process rows of the policy and rows of a reference at once.

    Each half of the prediction equals that of a separate forward, bit for bit if the layers' products do not depend on
    the batch size. The policy's half has the same gradient as in a separate forward, the reference's half has none.
    Until the backward only the policy's rows of each block's inputs are kept. Gradient checkpointing inside the blocks
    is off while they rerun: it would run most of their layers a third time.

    Args:
        policy: the network being trained, in eval mode, with LoRA layers in its blocks.
        reference: a module of the same structure that shares the policy's frozen parameters (the same objects, not
            copies) and has adapters of its own, which may be overwritten in place between forwards.
        parts: the policy's parts; see `Family.joint_parts`.

    Raises:
        ValueError: weights other than a LoRA's are trained, a LoRA layer lies outside the blocks or is not of the kind
            that `make_trainable` adds, or a frozen parameter is not shared.
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
        # Inside `rows` these return their input unchanged, and the last module of the tail runs the whole tail.
        self._passed = tail[:-1]
        inside = {part for unit in self._units.values() for part in unit.parts}
        self._row_layers = [layer for layer in parts.row_layers if layer not in inside]

    @contextmanager
    def rows(self, policy_rows: int) -> Iterator[None]:
        """Makes the policy's forward process `policy_rows` rows of the policy, then rows of the reference.

        Outside the block the policy's forward is unchanged; the backward may run there. A wrapper around the policy,
        such as DistributedDataParallel, is called as usual.

        Args:
            policy_rows: number of rows, from the start of the batch, that are the policy's.

        Raises:
            ValueError: the policy is in training mode, or a half has no rows (for the reference's half, the forward
                raises it).
        """
        if policy_rows < 1:
            raise ValueError(f"policy_rows = {policy_rows} must be at least 1")
        if self._policy.training:
            raise ValueError("policy: in training mode, rerun blocks would draw different dropout masks; call eval()")
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
    """Raises a ValueError if policy and reference cannot share a forward; see `JointModel`."""
    adapters = {weight for layer in layers for weight in layer.parameters()}
    adapters -= {weight for layer in layers for weight in layer.get_base_layer().parameters()}
    full = [name for name, weight in trainable(policy).items() if weight not in adapters]
    if full:
        raise ValueError(
            f"policy: {len(full)} trained weights do not belong to a LoRA, the first is {full[0]!r}. Policy and "
            "reference can share a forward only if they share their base weights. To train full weights, set "
            "reference.errors = ahead, which computes the reference's errors before the updates and needs no second "
            "network either"
        )
    inside = {part for block in blocks for part in block.modules()}
    if not all(_is_plain(ours) and _is_plain(theirs) and ours in inside for ours, theirs in layers.items()):
        raise ValueError(
            "policy, reference: each LoRA layer must be a peft Linear in a down, mid or up block, with one adapter, "
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
    """Tells which rows of a tensor are the policy's: those of the first samples in the batch.

    A tensor may have several rows per sample, as where a clip's frames are folded into the batch dimension.
    """

    def __init__(self, policy_rows: int) -> None:
        self._policy = policy_rows
        self._all = 0

    def count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records the batch size; a forward pre-hook of the network."""
        self._all = len(args[0] if args else kwargs["sample"])
        if self._policy >= self._all:
            raise ValueError(f"policy_rows = {self._policy} leaves the reference none of the batch's {self._all} rows")

    def policy(self, tensor: Tensor) -> int:
        """Returns how many rows of a tensor are the policy's."""
        assert len(tensor) % self._all == 0
        return len(tensor) // self._all * self._policy


class _Unit:
    """A block, or the tail, of the network: runs on all rows without a graph, and reruns the policy's rows with one.

    Args:
        run: the unit's forward.
        modules: the modules that it runs.
        layers: the reference's layer for each LoRA layer of the policy.
        row_layers: the row layers of the whole network (see `JointParts`); the unit picks those in its modules.
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
        """Returns a context in which the unit's layers process rows of policy and reference."""
        forwards = {layer: _halved(layer, rows) for layer in self._row_layers}
        return _replaced(forwards | {ours: _adapted(ours, theirs, rows) for ours, theirs in self._layers.items()})

    def without_recomputation(self) -> AbstractContextManager[None]:
        """Returns a context in which gradient checkpointing is off in the unit."""
        return without_recomputation(self.parts)


class _SharedForward(torch.autograd.Function):
    """Runs the forward on all rows, and the backward on the policy's.

    The adapters are inputs, so that autograd accumulates their gradients as usual (DistributedDataParallel waits for
    that). They are also saved, so that autograd notices if one changes before the backward.
    """

    @staticmethod
    def forward(ctx: Any, unit: _Unit, rows: _Rows, run: Callable[..., Any], *inputs: Tensor) -> tuple[Any, ...]:
        tensors = inputs[: len(inputs) - len(unit.parameters)]
        ctx.unit, ctx.run, ctx.lengths = unit, run, [len(tensor) for tensor in tensors]
        # Copied: a slice would keep the reference's rows alive as well.
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
            # Views instead of leaf tensors: FlopCounterMode hooks the modules' inputs, and its hooks raise an error
            # during `autograd.grad` if these are leaves.
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
    """Runs a unit's forward on rows of policy and reference."""
    tensors, refill = _take_tensors((args, kwargs))
    device_type = tensors[0].device.type
    # The rerun must cast as the first run did. No cache: each run casts an adapter only once, and the rerun must not
    # reuse a cast of the first run, which has no graph.
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
    """Returns a LoRA layer's forward on rows of policy and reference.

    It computes W x for all rows, and adds s B A x with each half's own adapter, as peft does.
    """

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
    """Returns a layer's forward on rows of policy and reference that runs one half after the other.

    For layers whose input has one row per sample (time embeddings): a product with few rows may be summed in another
    order than one with twice as many, so results would differ in bits from those of a separate forward. Running these
    layers twice costs next to nothing.
    """
    run = layer.forward

    def forward(x: Tensor) -> Tensor:
        count = rows.policy(x)
        return torch.cat([run(x[:count]), run(x[count:])])

    return forward


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replaces the forwards of these modules inside the block, on the objects only, not on their classes."""
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
    """Returns the tensors in arguments or results, each once, and a function that puts others in their place.

    A down block returns its hidden states twice, the second time as a residual; autograd must see them as one output.
    """
    tensors: dict[int, Tensor] = {}

    def take(tensor: Tensor) -> _Slot:
        tensors[id(tensor)] = tensor
        return _Slot(list(tensors).index(id(tensor)))

    form = _map(tree, Tensor, take)
    return list(tensors.values()), lambda others: _map(form, _Slot, lambda slot: others[slot])


class _Slot(int):
    """A placeholder for a tensor: its index in the list."""


def _map(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Applies `function` to every instance of `kind` in nested tuples, lists and dicts."""
    if isinstance(tree, kind):
        return function(tree)
    if type(tree) in (tuple, list):
        return type(tree)(_map(branch, kind, function) for branch in tree)
    if type(tree) is dict:
        return {key: _map(branch, kind, function) for key, branch in tree.items()}
    return tree


def _pad(gradient: Tensor | None, length: int) -> Tensor | None:
    """Appends the zero gradient of the reference's rows to the policy's gradient."""
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
