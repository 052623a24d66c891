"""What suite `kernels` compares: cases, random inputs, their exact results in float64, and implementations of the loss.

Shapes: B pairs; tensors `(2B, *latent)` hold the winners first; N elements per latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.measure import Machine
from seppo_fast.loss import PreferenceLoss, loss_and_grad, preference_loss

B2, B2_COMPILED, TWIN_COMPILED = "appendix B.2", "appendix B.2, compiled", "twin, compiled"
AUTOGRAD, ONE_PASS, OVERWRITING = "ours, autograd", "ours, loss_and_grad", "ours, overwriting"
BETA = 2000.0
COMPILER = "inductor"

EMBEDDED, SD = "embedded 32 px", "SD-1.5 512 px"
LATENTS = {
    EMBEDDED: (4, 8, 8),
    SD: (4, 64, 64),
    "SDXL 1024 px": (4, 128, 128),
    "video 16 x 256 px": (4, 16, 32, 32),
    "video 16 x 512 px": (4, 16, 64, 64),
}

# Memory formats: all tensors contiguous; predictions channels_last, as the trainer's UNet returns them, and the target
# contiguous; both channels_last. A case's name mentions the format unless it is the first.
LAYOUTS = ("contiguous", "channels_last predictions", "channels_last")

OTHER_DIVISIONS = 1  # divisions of a latent besides the one in use; on a GPU each is a provider of its own

_MOST_SETS = 1024
_AT_ONCE = 2**24  # elements generated, or checked in float64, at a time


@dataclass(frozen=True)
class Case:
    """One computation to compare.

    Attributes:
        pairs: B, the number of pairs.
        latent: a key of `LATENTS`.
        ahead: whether the reference's errors are given instead of its predictions.
        layout: one of `LAYOUTS`; only latents of pictures can have another than the first.
    """

    pairs: int
    latent: str
    ahead: bool = False
    layout: str = LAYOUTS[0]

    def __str__(self) -> str:
        given = "ref_error" if self.ahead else "ref_pred"
        layout = "" if self.layout == LAYOUTS[0] else f", {self.layout}"
        return f"{self.pairs} pair{'s' * (self.pairs > 1)}, {self.latent}, {given}{layout}"

    @property
    def elements(self) -> int:
        """The number of elements of the prediction."""
        return 2 * self.pairs * math.prod(LATENTS[self.latent])


@dataclass(frozen=True)
class Inputs:
    """One set of inputs, in bfloat16 except for the errors.

    Attributes:
        pred: (2B, *latent), a leaf that requires a gradient.
        target: (B, *latent).
        repeated: (2B, *latent), the target repeated for each half.
        ref_pred: (2B, *latent); None if `ref_error` is given.
        ref_error: (2B,) float32; None if `ref_pred` is given.
        scratch: a copy of `pred` that may be overwritten.
    """

    pred: Tensor
    target: Tensor
    repeated: Tensor
    ref_pred: Tensor | None
    ref_error: Tensor | None
    scratch: Tensor

    def nbytes(self, names: tuple[str, ...]) -> int:
        """Returns the total bytes of the named tensors."""
        return sum(x.nbytes for x in (getattr(self, name) for name in names) if x is not None)


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Returns random inputs with errors near 0.2, logits up to about 1, and no winner near a tie.

    Near a tie, rounding would choose between two losses. The policy's residuals are the reference's, made 0.05 to
    0.15 % smaller or larger, so that pairs to reject and pairs to learn alternate.
    """
    pairs, latent = case.pairs, LATENTS[case.latent]
    generator = torch.Generator(device).manual_seed(seed)
    target = torch.empty(pairs, *latent, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    pred, ref_pred = (target.new_empty(2 * pairs, *latent) for _ in range(2))
    ref_error = torch.empty(2 * pairs, device=device)
    far = torch.rand(2 * pairs, generator=generator, device=device).mul_(1e-3).add_(0.5e-3)
    index = torch.arange(pairs, device=device)
    larger = torch.cat([index % 2, index // 2 % 2])
    scale = (1 + (2 * larger - 1) * far).view(-1, *[1] * len(latent))
    for rows in _pieces(case):
        for half in (rows, slice(rows.start + pairs, rows.stop + pairs)):
            y = target[rows].float()
            residual = 0.45 * torch.randn(y.shape, generator=generator, device=device)
            pred[half] = y + scale[half] * residual
            ref_pred[half] = y + residual
            ref_error[half] = (ref_pred[half].double() - y.double()).square().flatten(1).mean(1).float()
    predictions, targets = {
        LAYOUTS[0]: (torch.contiguous_format, torch.contiguous_format),
        LAYOUTS[1]: (torch.channels_last, torch.contiguous_format),
        LAYOUTS[2]: (torch.channels_last, torch.channels_last),
    }[case.layout]
    pred, ref_pred = (x.to(memory_format=predictions) for x in (pred, ref_pred))
    target = target.to(memory_format=targets)
    return Inputs(
        pred=pred.requires_grad_(),
        target=target,
        repeated=torch.cat([target, target]).to(memory_format=targets),
        ref_pred=None if case.ahead else ref_pred,
        ref_error=ref_error if case.ahead else None,
        scratch=pred.detach().clone(),
    )


def _pieces(case: Case) -> Iterator[slice]:
    """Returns slices of the pairs, each small enough to be computed at once in float64."""
    step = max(1, _AT_ONCE // math.prod(LATENTS[case.latent]))
    return (slice(start, min(start + step, case.pairs)) for start in range(0, case.pairs, step))


def set_bytes(case: Case) -> int:
    """Returns the bytes of one set of inputs."""
    return case.elements * (7 if case.ahead else 9)


def input_sets(case: Case, machine: Machine) -> list[Inputs]:
    """Returns so many sets that cycling through them covers twice the cache; at most two in quick mode."""
    count = math.ceil(2 * machine.cache_bytes / set_bytes(case))
    return [make_inputs(case, machine.device, seed) for seed in range(min(2 if machine.quick else _MOST_SETS, count))]


class Truth:
    """Exact loss and gradient for a set of inputs, in float64.

    Attributes:
        loss: the loss, averaged over all pairs.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        differences = [[self._difference(half) for half in self._halves(rows)] for rows in _pieces(case)]
        winner, loser = (torch.cat(half) for half in zip(*differences, strict=True))
        flip = torch.where(winner <= 0, 1.0, -1.0).double()
        negative_logit = BETA / 2 * (winner - flip * loser)
        self.loss = F.softplus(negative_logit).mean().item()
        slope = BETA / 2 * torch.sigmoid(negative_logit) * 2 / inputs.target[0].numel() / case.pairs
        self._coefficient = torch.cat([slope, -flip * slope])

    def _halves(self, rows: slice) -> tuple[slice, slice]:
        return rows, slice(rows.start + self._case.pairs, rows.stop + self._case.pairs)

    def _residual(self, pred: Tensor, half: slice) -> Tensor:
        """Returns prediction minus target for some rows, (rows, N) float64."""
        first = half.start % self._case.pairs
        target = self._inputs.target[first : first + half.stop - half.start]
        return (pred[half].detach().double() - target.double()).flatten(1)

    def _difference(self, half: slice) -> Tensor:
        residual = self._residual(self._inputs.pred, half)
        if self._inputs.ref_pred is None:
            assert self._inputs.ref_error is not None
            return residual.square().mean(1) - self._inputs.ref_error[half].double()
        reference = self._residual(self._inputs.ref_pred, half)
        return ((residual - reference) * (residual + reference)).mean(1)

    def gaps(self, loss: Tensor, grad: Tensor) -> dict[str, float]:
        """Returns the relative error of a loss, and the relative RMS error of a gradient `(2B, *latent)`."""
        apart = whole = 0.0
        for rows in _pieces(self._case):
            for half in self._halves(rows):
                expected = self._coefficient[half, None] * self._residual(self._inputs.pred, half)
                apart += float((grad[half].double().flatten(1) - expected).square().sum())
                whole += float(expected.square().sum())
        return {"loss": abs(float(loss) / self.loss - 1), "gradient": math.sqrt(apart / whole)}


@dataclass(frozen=True)
class Way:
    """An implementation of loss and gradient.

    Attributes:
        run: computes both once.
        reads: names of the inputs that it reads.
        exact: whether it sums as precisely as ours, and must meet the same tolerance.
        transfers: latents that it moves per pair, by the kernels' byte model; None: no model applies.
    """

    run: Callable[[Inputs], tuple[Tensor, Tensor]]
    reads: tuple[str, ...] = ("pred", "target", "ref_pred", "ref_error")
    exact: bool = True
    transfers: int | None = None


def appendix_b2(
    model_pred: Tensor, target: Tensor, ref_pred: Tensor | None, ref_error: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns loss and implicit accuracy as written in the paper's appendix B.2; `ref_error` can replace `ref_pred`."""
    dims = list(range(1, model_pred.dim()))
    model_losses = (model_pred.float() - target.float()).pow(2).mean(dim=dims)
    model_losses_w, model_losses_l = model_losses.chunk(2)
    if ref_pred is not None:
        ref_error = (ref_pred.float() - target.float()).pow(2).mean(dim=dims)
    assert ref_error is not None
    ref_losses_w, ref_losses_l = ref_error.chunk(2)
    diff_w = model_losses_w - ref_losses_w
    diff_l = model_losses_l - ref_losses_l
    sign = torch.where(diff_w > 0, 1.0, -1.0)
    inside_term = -0.5 * BETA * (diff_w + sign * diff_l)
    implicit_acc = (inside_term > 0).float().mean()
    return -F.logsigmoid(inside_term).mean(), implicit_acc


def _twin(pred: Tensor, target: Tensor, ref_pred: Tensor | None, ref_error: Tensor | None) -> PreferenceLoss:
    return preference_loss(pred, target, ref_pred, ref_error=ref_error, beta=BETA, backend="torch")


def _differentiated(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        value = loss(inputs)
        return value.detach(), torch.autograd.grad(value, inputs.pred)[0]

    return run


def _ours(inputs: Inputs, overwrite: bool) -> tuple[Tensor, Tensor]:
    pred = inputs.scratch if overwrite else inputs.pred
    result, grad = loss_and_grad(
        pred, inputs.target, inputs.ref_pred, ref_error=inputs.ref_error, beta=BETA, overwrite=overwrite
    )
    return result.loss, grad


def ways(case: Case, machine: Machine, compiled: bool) -> dict[str, Way]:
    """Returns all implementations by name. The compiled ones are compiled anew, for the shapes of their next call."""
    torch._dynamo.reset()

    def b2(block: Callable[..., tuple[Tensor, Tensor]]) -> Way:
        run = _differentiated(lambda x: block(x.pred, x.repeated, x.ref_pred, x.ref_error)[0])
        return Way(run, ("pred", "repeated", "ref_pred", "ref_error"), exact=False)

    made = {B2: b2(appendix_b2)}
    if compiled:
        made[B2_COMPILED] = b2(torch.compile(appendix_b2, fullgraph=True, dynamic=False, backend=COMPILER))
        twin = torch.compile(_twin, fullgraph=True, dynamic=False, backend=COMPILER)
        made[TWIN_COMPILED] = Way(_differentiated(lambda x: twin(x.pred, x.target, x.ref_pred, x.ref_error).loss))

    def ours(x: Inputs) -> Tensor:
        return preference_loss(x.pred, x.target, x.ref_pred, ref_error=x.ref_error, beta=BETA).loss

    twice, once = transfers(case) if machine.device.type == "cuda" else (None, None)
    made[AUTOGRAD] = Way(_differentiated(ours), transfers=twice)
    made[ONE_PASS] = Way(partial(_ours, overwrite=False), transfers=once)
    made[OVERWRITING] = Way(
        partial(_ours, overwrite=True), ("scratch", "target", "ref_pred", "ref_error"), transfers=once
    )
    for name in other_divisions(machine.device):
        made[f"{ONE_PASS}, {name}"] = Way(partial(_divided, name, machine.device), transfers=once)
    return made


def other_divisions(device: torch.device) -> list[str]:
    """Returns the names of the divisions of a latent that are not in use on a GPU; for a CPU, none."""
    if device.type != "cuda":
        return []
    from seppo_fast.kernels import denoising_error as errors

    in_force = errors.CHOSEN.get(errors.capability(device), errors.DEFAULT)
    return [name for name in errors.DIVISIONS if name != in_force]


def _divided(name: str, device: torch.device, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with dividing(name, device):
        return _ours(inputs, overwrite=False)


@contextmanager
def dividing(name: str, device: torch.device) -> Iterator[None]:
    """Makes the kernels use the division `name` on GPUs of this kind inside the block."""
    from seppo_fast.kernels import denoising_error as errors

    kind, before = errors.capability(device), dict(errors.CHOSEN)
    errors.CHOSEN[kind] = name
    try:
        yield
    finally:
        errors.CHOSEN.clear()
        errors.CHOSEN.update(before)


def transfers(case: Case) -> tuple[int, int]:
    """Returns the latents moved per pair, by the kernels' byte model: through autograd, and by `loss_and_grad`."""
    from seppo_fast.kernels.denoising_error import division

    fewest = 5 if case.ahead else 7
    one_chunk = division(math.prod(LATENTS[case.latent]), torch.device("cpu"))["CHUNKS"] == 1
    return fewest + 3, fewest if one_chunk else fewest + 3


def is_right(what: str, case: Case, way: Way, inputs: Inputs, truth: Truth) -> bool:
    """Returns whether loss and gradient are within the tolerances that suite `kernels` documents; prints if not."""
    allowed = (1e-4 if case.ahead else 1e-5) if way.exact else 2e-3
    allowances = {"loss": allowed, "gradient": allowed + 2**-9}
    gaps = truth.gaps(*way.run(inputs))
    wrong = {part: gap for part, gap in gaps.items() if not gap <= allowances[part]}  # a NaN is wrong
    for part, gap in wrong.items():
        print(f"{case}, {what}: the {part} is off by {gap:.3g} relative to float64; {allowances[part]:.3g} is allowed")
    return not wrong


def compiles(machine: Machine) -> bool:
    """Returns whether torch.compile works here; if not, prints why."""
    try:
        torch.compile(lambda x: 2 * x, backend=COMPILER)(torch.ones(8, device=machine.device))
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"torch.compile does not work here, so its rows are left out: {' '.join(str(error).split())[:200]}")
        return False
    return True
