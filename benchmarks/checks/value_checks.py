"""The checks of `gpu_check` that compare values before anything is timed: kernels with float64, bits with bits.

Each function is a step: it gets a workplace and adds its findings. On a CPU it runs at a small size, and loss and
temporal attention use PyTorch's code instead of the kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.harness.losses import dividing, other_divisions
from benchmarks.harness.measure import distance
from benchmarks.harness.models import Workplace
from benchmarks.harness.rows import Row
from benchmarks.harness.speed import CHECK
from seppo_fast import shapes
from seppo_fast.loss import LEARN_SIGN, denoising_errors, loss_and_grad, preference_loss
from seppo_fast.models.temporal_attention import temporal_attention
from seppo_fast.models.trainable import DTYPES
from seppo_fast.references import ReferencePool
from seppo_fast.references.layout import PackedLayout
from seppo_fast.references.tiers import Budget
from seppo_fast.utils.memory import host_bytes, page_locked

SUITE = CHECK
BETA = 2000.0
_LN2 = float(torch.tensor(math.log(2.0)))
# Relative RMS error allowed for a gradient or an output that is rounded once to the dtype.
_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}
_ATTENTION = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@dataclass
class Found:
    """The findings of a step.

    Attributes:
        rows: rows for the results file; a wrong value has a row with `value_ok` false.
        lines: lines for the page.
    """

    rows: list[Row] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def value(self, case: str, ok: bool, baseline: str, detail: str = "") -> None:
        """Records whether a value is right; a wrong value also gets a line on the page.

        Args:
            case: what was checked.
            ok: whether the value is right.
            baseline: what the value was compared with.
            detail: further text for the line.
        """
        self.rows.append(Row(SUITE, case, "ours", baseline, ok))
        text = f"{case}: {'right' if ok else 'WRONG'}{', ' * bool(detail)}{detail}"
        print(text, flush=True)
        if not ok:
            self.lines.append(text)

    @property
    def wrong(self) -> list[str]:
        """The cases with wrong values."""
        return [row.case for row in self.rows if not row.value_ok]


_SFT_WEIGHT, _MU = 0.01, 0.5  # make both loss terms similar in size, and scale some losers


@dataclass(frozen=True)
class _Loss:
    """One combination of the loss's inputs: shapes, dtypes and layouts that trainers use, and unusual ones."""

    pairs: int
    latent: tuple[int, ...]
    dtype: torch.dtype
    shared: bool
    ahead: bool
    flipper: str
    weighted: bool
    channels_last: bool
    guarded: bool

    def __str__(self) -> str:
        words = [f"{self.pairs} x {'x'.join(map(str, self.latent))}", str(self.dtype).removeprefix("torch.")]
        words += [self.flipper, "ref_error" if self.ahead else "ref_pred"]
        words += [word for word in ("shared", "weighted", "channels_last", "guarded") if getattr(self, word)]
        return ", ".join(words)


def _losses(small: bool) -> Iterator[_Loss]:
    latents = [(3, (4, 9, 7)), (1, (4, 64, 64)), (5, (4, 64, 64)), (2, (4, 128, 128)), (2, (4, 5, 16, 24))]
    turns = itertools.cycle(itertools.product((True, False), repeat=4))
    flippers = itertools.cycle(LEARN_SIGN)
    for pairs, latent in latents[:2] if small else latents:
        for dtype in _ROUNDING:
            shared, ahead, weighted, last = next(turns)
            for given in (ahead, not ahead):
                last = last and len(latent) == 3
                yield _Loss(pairs, latent, dtype, shared, given, next(flippers), weighted, last, given != shared)


def loss(place: Workplace, found: Found) -> None:
    """Checks loss, statistics and gradient against float64, exact ties, and equal bits in repeats and a CUDA graph."""
    device = place.machine.device
    for case in _losses(small=device.type == "cpu"):
        inputs = _loss_inputs(case, device)
        _compare_loss(f"loss, {case}", case, inputs, found)
        for name in other_divisions(device):
            with dividing(name, device):
                _compare_loss(f"loss, {case}, {name}", case, inputs, found)
    _ties(device, found)
    _repeats(device, found)


def _loss_inputs(case: _Loss, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(7)

    def normal(rows: int) -> Tensor:
        made = torch.randn(rows, *case.latent, generator=generator, device=device)
        return made.to(memory_format=torch.channels_last) if case.channels_last else made

    target = normal(case.pairs if case.shared else 2 * case.pairs)
    both = torch.cat([target, target]) if case.shared else target
    ref_pred = (both + 0.45 * normal(2 * case.pairs)).to(case.dtype)
    pred = (ref_pred.float() + 0.02 * normal(2 * case.pairs)).to(case.dtype)
    target = target.to(case.dtype)
    weights = torch.rand(case.pairs, generator=generator, device=device) if case.weighted else None
    ref = {"ref_error": denoising_errors(ref_pred, target)} if case.ahead else {"ref_pred": ref_pred}
    return {"model_pred": pred, "target": target, "weights": weights, **ref}


def _exact(case: _Loss, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Computes SePPO, eq. 8-10, in float64, with the gradient written out."""
    pred, target = inputs["model_pred"].double(), inputs["target"].double()
    both = torch.cat([target, target]) if case.shared else target
    residual = (pred - both).flatten(1)
    if case.ahead:
        difference = residual.square().mean(1) - inputs["ref_error"].double()
    else:
        other = (inputs["ref_pred"].double() - both).flatten(1)
        difference = ((residual - other) * (residual + other)).mean(1)
    winner, loser = difference.chunk(2)
    sign = torch.where(winner <= 0, 1.0, LEARN_SIGN[case.flipper]).double()
    omega = 1.0 if inputs["weights"] is None else inputs["weights"].double()
    logit = -BETA / 2 * omega * (winner - sign * loser)
    slope = BETA / 2 * omega * torch.sigmoid(-logit)
    loss, term, room = torch.nn.functional.softplus(-logit).mean(), 0.0, torch.ones_like(winner)
    if case.guarded:
        own, other = residual.chunk(2)
        against, term = sign * (own * other).sum(1), _SFT_WEIGHT * BETA / 4
        room = torch.where(against > 0, ((1 - _MU) * own.square().sum(1) / against).clamp(max=1.0), 1.0)
        loss = loss + term * own.square().mean()
    each = torch.cat([slope + term, -sign * room * slope]) * 2 / residual.shape[1] / case.pairs
    gradient = each[:, None] * residual
    return {"loss": loss, "logit": logit, "winner": winner, "gradient": gradient.view_as(pred)}


def _compare_loss(name: str, case: _Loss, inputs: dict[str, Any], found: Found) -> None:
    """Compares loss, logit, signs and gradient with float64.

    The logit may be off by 1e-6 (from reference predictions) or 5e-5 (from reference errors) plus 2e-6 of its value;
    signs are compared unless |D_w| < 2e-7. The gradient may be off by its rounding plus the logit's absolute tolerance,
    as the sigmoid's relative slope is at most 1.
    """
    options = {**inputs, "beta": BETA, "flipper": case.flipper}
    if case.guarded:
        options |= {"sft_weight": _SFT_WEIGHT, "safeguard": _MU}
    leaf = inputs["model_pred"].detach().requires_grad_()
    through = preference_loss(**{**options, "model_pred": leaf})
    gradients = [torch.autograd.grad(through.loss, leaf)[0]]
    for overwrite in (False, True):
        result, grad = loss_and_grad(**{**options, "model_pred": leaf.detach().clone()}, overwrite=overwrite)
        gradients.append(grad)
        same = torch.equal(result.loss, through.loss.detach()) and torch.equal(result.logit, through.logit)
        if not same:
            found.value(f"{name}: at once as through autograd", False, "autograd")
    right = _exact(case, inputs)
    absolute = 5e-5 if case.ahead else 1e-6
    allowed = absolute + 2e-6 * right["logit"].abs()
    gaps = {
        "logit": float(((through.logit.detach().double() - right["logit"]).abs() / allowed).max()),
        "loss": float((through.loss.detach().double() - right["loss"]).abs() / allowed.max()),
        "gradient": max(distance([x], [right["gradient"]]) for x in gradients) / (_ROUNDING[case.dtype] + absolute),
    }
    clear = right["winner"].abs() > 2e-7
    signs = bool(((through.reject == (right["winner"] <= 0)) | ~clear).all())
    ok = signs and all(gap <= 1 for gap in gaps.values())  # False for NaN
    shown = ", ".join(f"{part} {gap:.2g}" for part, gap in gaps.items())
    found.value(name, ok, "float64", f"of what is allowed: {shown}{'' if signs else ', signs differ'}")


def _ties(device: torch.device, found: Found) -> None:
    """Checks equal predictions: D is exactly 0, the loss is ln 2, and all pairs reject."""
    for latent in ((4, 64, 64), (4, 128, 128)):
        pred = torch.randn(6, *latent, device=device).bfloat16()
        target = torch.randn(3, *latent, device=device)
        references: list[dict[str, Any]] = [{"ref_pred": pred.clone()}, {"ref_error": denoising_errors(pred, target)}]
        for ref in references:
            tied = preference_loss(pred, target, **ref, beta=BETA)
            ok = not tied.logit.any() and bool(tied.reject.all()) and float(tied.loss) == _LN2
            found.value(f"loss, equal predictions, {next(iter(ref))}, {latent[1]} wide", ok, "zero and ln 2")


def _repeats(device: torch.device, found: Found) -> None:
    """Checks that repeated calls and a CUDA graph give the same bits."""
    pred, ref_pred = (torch.randn(32, 4, 64, 64, device=device).bfloat16() for _ in range(2))
    target = torch.randn(16, 4, 64, 64, device=device)

    def once() -> list[Tensor]:
        result, grad = loss_and_grad(pred, target, ref_pred, beta=BETA)
        return [result.loss, result.logit, grad]

    first = [made.clone() for made in once()]
    found.value("loss, ten times", all(torch.equal(a, b) for _ in range(10) for a, b in zip(first, once())), "itself")
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = once()
        for _ in range(3):
            graph.replay()
        found.value("loss, from a graph", all(map(torch.equal, first, captured)), "a plain call")


def temporal(place: Workplace, found: Found) -> None:
    """Checks attention over frames and its gradients against float64, in both layouts, up to the maximum of frames."""
    device = place.machine.device
    small = device.type == "cpu"
    sizes = [(16, 64, 40), (16, 16, 80), (16, 9, 160), (5, 37, 40), (32, 37, 80)]
    for (frames, positions, width), dtype in itertools.product(sizes[3:] if small else sizes, _ATTENTION):
        for inside in (False, True):
            generator = torch.Generator(device).manual_seed(0)
            shape = (2, positions, frames, 8, width) if inside else (2, frames, positions, 8, width)
            made = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4)]
            q, k, v, grad = (x.transpose(1, 2) if inside else x for x in made)
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = temporal_attention(leaves[0], leaves[1], leaves[2])
            ours = [out, *torch.autograd.grad(out, leaves, grad)]
            gap = max(distance([a], [b]) for a, b in zip(ours, _exact_attention(q, k, v, grad), strict=True))
            layout = "frames inside" if inside else "frames outside"
            name = f"temporal attention, {frames} x {positions}, {width} wide, {str(dtype)[6:]}, {layout}"
            found.value(name, gap <= _ATTENTION[dtype], "float64", f"{gap:.1e}, {_ATTENTION[dtype]:.1e} is allowed")


def _exact_attention(*inputs: Tensor) -> list[Tensor]:
    q, k, v, grad = (x.double().permute(0, 2, 3, 1, 4) for x in inputs)  # (B, P, H, F, D)
    scale = q.shape[-1] ** -0.5
    weights = torch.softmax(q @ k.mT * scale, -1)
    slopes = grad @ v.mT
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True)) * scale
    results = weights @ v, slopes @ k, slopes.mT @ q, weights.mT @ grad
    return [x.permute(0, 3, 1, 2, 4) for x in results]


def pool(place: Workplace, found: Found) -> None:
    """Checks that past policies from every tier predict the same bits as before, on a GPU also in a captured graph."""
    device, dtype = place.machine.device, DTYPES[place.machine.precision]
    unet = UNet2DConditionModel.from_pretrained(shapes.PIPELINE, subfolder="unet").eval()
    unet.to(device, memory_format=torch.channels_last)
    size = PackedLayout.of(unet, dtype).size
    on_device = {"device": size} if device.type == "cuda" else {}
    budget = Budget(**on_device, host=2 * size, disk=2 * size)
    checkpoints = 5 if on_device else 4
    with ReferencePool(0, compute=dtype, budget=budget, folder=place.folder) as pool:
        expected = []
        for seed in range(checkpoints):
            _nudge(unet, seed)
            expected.append(_predictions(unet, dtype))
            pool.add(unet)
        tiers = list(pool.tiers.values())
        wanted = ["device"] * bool(on_device) + ["host"] * 2 + ["disk"] * 2
        found.value("pool, tiers are filled in order", tiers == wanted, "device, host, disk", ", ".join(tiers))
        order = [index for start in range(checkpoints) for index in (start, (start + 2) % checkpoints)]
        for turn, (index, following) in enumerate(itertools.pairwise(order)):
            with pool.resident(unet, index) as reference:
                same = all(map(torch.equal, _predictions(reference, dtype), expected[index]))
            pool.prefetch(following)
            if not same:
                found.value(f"pool, switch {turn} to a checkpoint in {tiers[index]} memory", False, "its own bits")
        right = all(map(torch.equal, _predictions(unet, dtype), expected[-1])) and not found.wrong
        found.value(f"pool, {len(order) - 1} switches and the policy after them", right, "its own bits")
    if device.type == "cuda":
        _switches_under_a_graph(place.folder, found)
        _refused_memory(found)


def _nudge(unet: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def _predictions(unet: torch.nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Returns predictions with autograd and without, as the two may use different kernels."""
    device = next(unet.parameters()).device
    generator = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 96, generator=generator)
    inputs = latents.to(device), torch.tensor([7, 900], device=device), embeds.to(device)
    made = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            made.append(unet(*inputs[:2], encoder_hidden_states=inputs[2]).sample.detach())
    return made


def _switches_under_a_graph(folder: Path, found: Found) -> None:
    """Checks that a replay right after a switch uses the weights switched to, while a prefetch may be running."""
    module = torch.nn.Linear(257, 129, device="cuda")
    size, expected = PackedLayout.of(module).size, []
    with ReferencePool(0, budget=Budget(device=size, host=2 * size, disk=2 * size), folder=folder) as pool:
        with torch.no_grad():
            for seed in range(5):
                _nudge(module, seed)
                expected.append(2 * module.weight.detach().clone())
                pool.add(module)
            pool.bind(module)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                doubled = 2 * module.weight
        right = True
        for turn in range(60):
            index = turn * 3 % 5
            pool.load_into(module, index)
            graph.replay()
            right &= torch.equal(doubled, expected[index])
            pool.prefetch((turn + 1) * 3 % 5)
        found.value("pool, a graph's replay after each of 60 switches", right, "the weights drawn")


def _refused_memory(found: Found) -> None:
    """Checks that a failed attempt to pin memory leaves no pending error for the next kernel."""
    host = host_bytes(1 << 20)
    pinned = page_locked(host)
    try:
        page_locked(host)  # already registered, so the driver refuses
        refused = False
    except RuntimeError:
        refused = True
    works = float(torch.ones(3, device="cuda").sum()) == 3 and pinned.nbytes == host.nbytes
    found.value("pool, a refused registration leaves no error behind", refused and works, "a kernel that runs")
