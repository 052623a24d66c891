"""Where a pair's time goes, counted and not measured: `python -m benchmarks.census --json FILE`, a minute on a CPU.

SD-1.5 at 512 px in bfloat16 autocast, on tensors without data, through the package's own sampler, noising, forward and
optimizer. Counted of each phase are the operations that launch (PyTorch's operators that are no views; some launch
several kernels), the bytes that these read and write, and the FLOP. With the nominal limits of an H200 two shares of a
pair follow, one for each end of batch size: of its time, where a phase takes its FLOP at the matrix rate or its bytes
at the memory rate, whichever is more (a floor, which no phase reaches); and of its launches, which is what counts in
batches of one, where the GPU waits for the host.

The question behind it: are noising, guidance and the solver's step worth a kernel of their own? It could save at most
what they take.

Autocast is the CPU's, which leaves norms in bfloat16 where CUDA takes them in float32, so the UNet's bytes are rather
more there. Attention is one fused operation. Guidance and a solver's step are averages over the steps of a sample.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

from seppo_fast.models.unet import UNetFamily
from seppo_fast.utils.logging import quiet_libraries

quiet_libraries()

import torch  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count  # noqa: E402

from benchmarks.harness.counters import SD15, SD15_VAE  # noqa: E402
from benchmarks.harness.losses import LATENTS, SD, Case, transfers  # noqa: E402
from benchmarks.harness.provenance import provenance  # noqa: E402
from benchmarks.harness.speed import three_digits  # noqa: E402
from seppo_fast import shapes  # noqa: E402
from seppo_fast.config.schema import ModelConfig, SamplerConfig, TrainConfig  # noqa: E402
from seppo_fast.data.cache.build import encoded_at_once  # noqa: E402
from seppo_fast.diffusion.conditioning import Conditioning  # noqa: E402
from seppo_fast.diffusion.sampler import DiffusionSolver, Sampler  # noqa: E402
from seppo_fast.diffusion.schedule import NoiseSchedule  # noqa: E402
from seppo_fast.loss import preference_loss  # noqa: E402
from seppo_fast.methods.pairs import NoisedBatch, Pairs, noised  # noqa: E402
from seppo_fast.methods.reference_errors import predict_like_policy  # noqa: E402
from seppo_fast.models.denoiser import Denoiser  # noqa: E402
from seppo_fast.models.encoders import PROMPT_EMBEDS, PictureVae  # noqa: E402
from seppo_fast.models.fake import fake_copy  # noqa: E402
from seppo_fast.models.families.sd15 import StableDiffusion  # noqa: E402
from seppo_fast.models.trainable import make_trainable, trainable  # noqa: E402
from seppo_fast.train.optimizer import make_optimizer  # noqa: E402

FLOPS, BANDWIDTH = 989e12, 4.8e12  # of an H200, by NVIDIA's data sheet: dense bfloat16 FLOP/s, bytes/s
SAMPLES, PAIRS = 64, 16  # of a sampling batch, and of a learner's micro-batch, which is an update here
MODES = {"exact": ("ddim", 50, 1), "fast": ("dpmsolver++", 20, 4)}  # solver, steps, pairs that a sample serves

UNET, GUIDANCE = "UNet, doubled batch", "guidance"
SOLVERS = {"exact": "DDIM's step", "fast": "DPM-Solver++'s step"}
NOISING, REFERENCE, POLICY = "noising", "reference's forward", "policy, forward and backward"
LOSS, LOSS_AUTOGRAD, LOSS_PYTORCH = "loss_and_grad", "or the loss by autograd", "or the loss in PyTorch"
UPDATE = "clip, AdamW"
SMALL = (GUIDANCE, *SOLVERS.values(), NOISING)
ROUND_TRIP = "or with sampler.round_trip: decode, encode"
BESIDE = (LOSS_AUTOGRAD, LOSS_PYTORCH, ROUND_TRIP)  # in place of LOSS, or optional: no part of a pair

# The FLOP counter does not know the CPU's fused attention; both are given shapes, and more that is not needed.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}
_SHARES = ("share_of_time", "share_of_launches")
_UNREAD = ("copy_", "fill_", "zero_")  # they write over what they are given first


@dataclass(frozen=True)
class Count:
    """Operations that launch, bytes that they read and write, FLOP."""

    operations: float
    moved_bytes: float
    flops: float

    @property
    def seconds(self) -> float:
        """The floor of its time."""
        return max(self.flops / FLOPS, self.moved_bytes / BANDWIDTH)


class _Operations(TorchDispatchMode):
    """Adds up operations that launch on a device, and their bytes.

    An expanded tensor counts once. What is looked up in a table counts as the whole table.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.operations = self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        arguments = func._schema.arguments
        given = dict(zip([argument.name for argument in arguments], args, strict=False)) | (kwargs or {})
        written = [one.name for one in arguments if one.alias_info is not None and one.alias_info.is_write]
        changed = self._tensors([given.get(name) for name in written])
        read = self._tensors(list(given.values()))
        known = [tensor.untyped_storage() for tensor in read]
        made = [x for x in self._tensors(result) if not any(x.untyped_storage() is storage for storage in known)]
        name = func.overloadpacket.__name__
        if (made or changed) and "empty" not in name:
            self.operations += 1
            self.moved_bytes += sum(map(_bytes, [*read, *made, *([] if name in _UNREAD else changed)]))
        return result

    def _tensors(self, tree: Any) -> list[Tensor]:
        return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == self._device.type]


def _bytes(tensor: Tensor) -> int:
    elements = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements


def count(call: Callable[[], object], device: torch.device) -> Count:
    """What a call does on tensors without data: fake ones on the CPU, or those of the device `meta`."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as flops, _Operations(device) as operations:
        call()
    return Count(operations.operations, operations.moved_bytes, flops.get_total_flops())


@cache
def solver_counts(solver: str, steps: int) -> tuple[Count, Count]:
    """Guidance and the solver of a step of `SAMPLES` samples, averages over all steps of the package's sampler."""
    device = torch.device("meta")
    noise = torch.empty(SAMPLES, *LATENTS[SD], device=device)
    embeds = Conditioning({PROMPT_EMBEDS: torch.empty(SAMPLES, 77, 768, dtype=torch.bfloat16, device=device)})

    def denoise(rows: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        return torch.empty_like(rows, dtype=torch.bfloat16)

    def a_step(guidance: float) -> Count:
        config = SamplerConfig.model_validate({"name": solver, "steps": steps, "guidance": guidance})
        sampler = Sampler(config, lambda shape: DiffusionSolver(_scheduler(), config))
        whole = count(partial(sampler, denoise, noise, embeds, embeds.take(slice(0, 1))), device)
        return Count(whole.operations / steps, whole.moved_bytes / steps, 0.0)

    guided, plain = a_step(7.5), a_step(1.0)
    return Count(guided.operations - plain.operations, guided.moved_bytes - plain.moved_bytes, 0.0), plain


def _scheduler() -> dict[str, Any]:
    """The configuration of the embedded pipeline's, which has SD-1.5's schedule."""
    return dict(DDIMScheduler.load_config(shapes.PIPELINE, subfolder="scheduler"))


class Phases:
    """The UNet on fake tensors, and what is done with it.

    Args:
        train: what is trained.
        unet: configuration of the UNet.
    """

    def __init__(self, train: Literal["lora", "full"], unet: Mapping[str, Any]) -> None:
        with torch.device("meta"):
            meta = UNet2DConditionModel(**unet)
            make_trainable(meta, ModelConfig(train=train), 0, UNetFamily)
            meta.to(memory_format=torch.channels_last)
            vae = AutoencoderKL(**SD15_VAE)
        self._mode, self._device = FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")
        self._latent = meta.config.in_channels, meta.config.sample_size, meta.config.sample_size
        self._width = meta.config.cross_attention_dim
        self._coder = PictureVae(vae, self._device, torch.bfloat16).coder()
        self._schedule = NoiseSchedule(_scheduler())  # which looks at its own numbers
        with self._mode:
            self._unet = fake_copy(meta)
            denoise = partial(StableDiffusion.denoise, cast(StableDiffusion, None))
            family = SimpleNamespace(device=self._device, denoise=denoise)
            self._denoiser = Denoiser(cast(StableDiffusion, family), torch.bfloat16)

    def sampling(self) -> Count:
        """A forward of the doubled batch of `SAMPLES` samples."""
        with self._mode, torch.no_grad(), self._denoiser.autocast():
            rows = 2 * SAMPLES
            inputs = torch.empty(rows, *self._latent), torch.empty(rows, dtype=torch.int64), self._embeds(rows)
            call = partial(self._denoiser.denoise, self._unet, *inputs)
            call()  # casts the weights, for all steps
            return count(call, self._device)

    def round_trip(self) -> tuple[Count, int]:
        """Returns what decoding and encoding a batch does, and its size, which is the data cache's."""
        rows = encoded_at_once(None)
        with self._mode, torch.no_grad(), self._denoiser.autocast():
            network, latents = fake_copy(self._coder.network), torch.empty(rows, *self._latent)
            return count(partial(self._coder.there_and_back, network, latents), self._device), rows

    def learning(self) -> dict[str, Count]:
        """What is done with `PAIRS` pairs, and an update."""
        with self._mode, torch.enable_grad():
            pairs = self._pairs()
            shown = self._noised(pairs)
            prediction = torch.empty_like(shown.latents, dtype=torch.bfloat16).requires_grad_()

            def policy() -> None:
                self._denoiser.denoise(self._unet, *shown[:3]).backward(prediction.detach())

            def loss() -> None:
                errors = pairs.ref_error
                preference_loss(prediction, shown.target, ref_error=errors, backend="torch").loss.backward()

            optimizer = make_optimizer(self._unet, 1e-4, TrainConfig())

            def update() -> None:
                weights = list(trainable(self._unet).values())
                torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)  # as it is by itself on CUDA
                optimizer.step()

            made = {
                NOISING: count(lambda: self._noised(pairs), self._device),
                REFERENCE: count(lambda: predict_like_policy(self._denoiser, self._unet, shown), self._device),
                POLICY: count(policy, self._device),
                LOSS_PYTORCH: count(loss, self._device),
            }
            update()  # makes the optimizer's state
            return made | {UPDATE: count(update, self._device)}

    def _noised(self, pairs: Pairs) -> NoisedBatch:
        return noised(pairs, self._schedule, self._device)

    def _pairs(self) -> Pairs:
        winners, losers, noise = torch.empty(3, PAIRS, *self._latent)
        timesteps, errors = torch.empty(PAIRS, dtype=torch.int64), torch.empty(2 * PAIRS)
        return Pairs(tuple(range(PAIRS)), winners, losers, timesteps, noise, self._embeds(PAIRS), errors)

    def _embeds(self, rows: int) -> Conditioning:
        return Conditioning({PROMPT_EMBEDS: torch.empty(rows, 77, self._width, dtype=torch.bfloat16)})


def census(train: Literal["lora", "full"], unet: Mapping[str, Any] = SD15) -> list[dict[str, Any]]:
    """The phases of a pair: what a call does, for how many samples or pairs; of one of these the floor; the shares."""
    phases = Phases(train, unet)
    counts = {UNET: (phases.sampling(), SAMPLES)}
    for mode, (solver, steps, _) in MODES.items():
        guidance, step = solver_counts(solver, steps)
        counts |= {GUIDANCE: (guidance, SAMPLES), SOLVERS[mode]: (step, SAMPLES)}
    counts[ROUND_TRIP] = phases.round_trip()
    learning, case = phases.learning(), Case(PAIRS, SD, ahead=True)
    for phase, launches, latents in zip((LOSS_AUTOGRAD, LOSS), (2, 1), transfers(case), strict=True):
        learning[phase] = Count(launches, latents * case.elements, 0.0)
    order = (NOISING, REFERENCE, POLICY, LOSS, LOSS_AUTOGRAD, LOSS_PYTORCH, UPDATE)
    counts |= {phase: (learning[phase], PAIRS) for phase in order}
    rows: list[dict[str, Any]] = [
        {"phase": phase, "units": units, **asdict(call), "floor_us": 1e6 * call.seconds / units}
        for phase, (call, units) in counts.items()
    ]
    for share, key in zip(_SHARES, ("floor_us", "operations"), strict=True):
        for mode in MODES:
            whole = sum(times(row["phase"], mode) * row[key] for row in rows if row["phase"] not in BESIDE)
            for row in rows:
                row.setdefault(share, {})[mode] = times(row["phase"], mode) * row[key] / whole
    return rows


def times(phase: str, mode: str) -> float:
    """How often a phase comes for a pair: noising for the reference's forward and for the policy's."""
    _, steps, pairs = MODES[mode]
    if phase == ROUND_TRIP:
        return 1 / pairs
    if phase in (UNET, GUIDANCE, SOLVERS[mode]):
        return steps / pairs
    return {NOISING: 2, **dict.fromkeys(SOLVERS.values(), 0)}.get(phase, 1)


def census_table(result: dict[str, Any]) -> str:
    """The README's table, in markdown: the phases of a pair where a LoRA is trained."""
    lines = [
        "| phase | launches | MB | GFLOP | floor, µs | share of time, exact | fast | share of launches, exact | fast |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["phases"]["lora"]:
        flops = three_digits(row["flops"] / row["units"] / 1e9) if row["flops"] else ""
        cells = [row["phase"], f"{row['operations']:,.0f}", three_digits(row["moved_bytes"] / row["units"] / 1e6)]
        shares = [_percent(row[share][mode]) for share in _SHARES for mode in MODES]
        cells += [flops, three_digits(row["floor_us"]), *shares]
        lines.append(f"| {' | '.join(cells)} |")
    small = [[row for row in rows if row["phase"] in SMALL] for rows in result["phases"].values()]
    most = [_percent(max(row[key][mode] for rows in small for row in rows for mode in MODES)) for key in _SHARES]
    whole = [_percent(max(sum(row[key][mode] for row in rows) for rows in small for mode in MODES)) for key in _SHARES]
    lines += [
        "",
        f"`{result['command']}`: a LoRA trained, {SAMPLES} samples or {PAIRS} pairs at once; MB, GFLOP and floor (at "
        f"{FLOPS / 1e12:.0f} TFLOP/s and {BANDWIDTH / 1e12:.1f} TB/s) of one; torch {result['torch']}, commit "
        f"{result['commit']}. Guidance, a solver's step and noising take at most {most[0]} of a pair's time each and "
        f"{whole[0]} together, {most[1]} of its launches each and {whole[1]} together, also where all weights are "
        "trained.",
    ]
    return "\n".join(lines)


def _percent(share: float) -> str:
    if not share:
        return ""
    return f"{100 * share:.2g} %" if share >= 1e-5 else "< 0.001 %"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    result = provenance("benchmarks.census") | {"phases": {"lora": census("lora"), "full": census("full")}}
    print(census_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
