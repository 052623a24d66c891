"""Counts, without measuring, where a pair's time goes: `python -m benchmarks.census --json FILE`, a minute on a CPU.

Runs SD-1.5 at 512 px in bfloat16 autocast, on tensors without data, through the package's own sampler, noising, forward
and optimizer. For each phase it counts the operations that launch (PyTorch operators that are not views; some launch
several kernels), the bytes that they read and write, and the FLOP. With the nominal limits of an H200, two shares of a
pair follow, one for each extreme of batch size:

- share of time: a phase takes its FLOP at the matrix rate or its bytes at the memory rate, whichever is longer (a floor
  that no phase reaches);
- share of launches: what matters in batches of one, where the GPU waits for the host.

The question behind it: are noising, guidance and the solver's step worth a kernel of their own? Such a kernel could
save at most the time they take.

Autocast is the CPU's, which leaves norms in bfloat16, whereas CUDA computes them in float32, so the UNet moves somewhat
more bytes on CUDA. Attention counts as one fused operation. Guidance and a solver's step are averages over the steps of
a sample.
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

FLOPS, BANDWIDTH = 989e12, 4.8e12  # H200, by NVIDIA's data sheet: dense bfloat16 FLOP/s, bytes/s
SAMPLES, PAIRS = 64, 16  # sizes of a sampling batch and of a learner's micro-batch; here an update is one micro-batch
MODES = {"exact": ("ddim", 50, 1), "fast": ("dpmsolver++", 20, 4)}  # solver, steps, pairs per sample

UNET, GUIDANCE = "UNet, doubled batch", "guidance"
SOLVERS = {"exact": "DDIM's step", "fast": "DPM-Solver++'s step"}
NOISING, REFERENCE, POLICY = "noising", "reference's forward", "policy, forward and backward"
LOSS, LOSS_AUTOGRAD, LOSS_PYTORCH = "loss_and_grad", "or the loss by autograd", "or the loss in PyTorch"
UPDATE = "clip, AdamW"
SMALL = (GUIDANCE, *SOLVERS.values(), NOISING)
ROUND_TRIP = "or with sampler.round_trip: decode, encode"
BESIDE = (LOSS_AUTOGRAD, LOSS_PYTORCH, ROUND_TRIP)  # alternatives to LOSS, or optional; not counted in a pair's total

# The FLOP counter does not know the CPU's fused attention. Its functions get the tensors' shapes first, then arguments
# that are not needed here.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}
_SHARES = ("share_of_time", "share_of_launches")
_UNREAD = ("copy_", "fill_", "zero_")  # overwrite their first argument without reading it


@dataclass(frozen=True)
class Count:
    """Number of operations that launch, bytes that they read and write, and FLOP."""

    operations: float
    moved_bytes: float
    flops: float

    @property
    def seconds(self) -> float:
        """A lower bound of the time, in seconds."""
        return max(self.flops / FLOPS, self.moved_bytes / BANDWIDTH)


class _Operations(TorchDispatchMode):
    """Counts the operations that launch on a device, and their bytes.

    Of an expanded tensor only the elements in memory count. A table lookup counts the whole table as read.
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
    """Counts what a call does on tensors without data: fake tensors on the CPU, or tensors on the device `meta`."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as flops, _Operations(device) as operations:
        call()
    return Count(operations.operations, operations.moved_bytes, flops.get_total_flops())


@cache
def solver_counts(solver: str, steps: int) -> tuple[Count, Count]:
    """Returns the counts of guidance and of the solver for a step of `SAMPLES` samples, averaged over all steps."""
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
    """Returns the configuration of the embedded pipeline's scheduler, which has SD-1.5's schedule."""
    return dict(DDIMScheduler.load_config(shapes.PIPELINE, subfolder="scheduler"))


class Phases:
    """Counts the phases of a pair on a UNet of fake tensors.

    Args:
        train: what is trained: "lora" or "full".
        unet: the UNet's configuration.
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
        self._schedule = NoiseSchedule(_scheduler())  # outside the fake mode, since it inspects its own values
        with self._mode:
            self._unet = fake_copy(meta)
            denoise = partial(StableDiffusion.denoise, cast(StableDiffusion, None))
            family = SimpleNamespace(device=self._device, denoise=denoise)
            self._denoiser = Denoiser(cast(StableDiffusion, family), torch.bfloat16)

    def sampling(self) -> Count:
        """Counts a forward of `SAMPLES` samples, a batch that guidance doubles."""
        with self._mode, torch.no_grad(), self._denoiser.autocast():
            rows = 2 * SAMPLES
            inputs = torch.empty(rows, *self._latent), torch.empty(rows, dtype=torch.int64), self._embeds(rows)
            call = partial(self._denoiser.denoise, self._unet, *inputs)
            call()  # casts the weights, which happens once for all steps
            return count(call, self._device)

    def round_trip(self) -> tuple[Count, int]:
        """Returns the count of decoding and encoding a batch, and the batch's size, which is the data cache's."""
        rows = encoded_at_once(None)
        with self._mode, torch.no_grad(), self._denoiser.autocast():
            network, latents = fake_copy(self._coder.network), torch.empty(rows, *self._latent)
            return count(partial(self._coder.there_and_back, network, latents), self._device), rows

    def learning(self) -> dict[str, Count]:
        """Counts the learner's phases for `PAIRS` pairs, including an update."""
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
                torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)  # the default on CUDA
                optimizer.step()

            made = {
                NOISING: count(lambda: self._noised(pairs), self._device),
                REFERENCE: count(lambda: predict_like_policy(self._denoiser, self._unet, shown), self._device),
                POLICY: count(policy, self._device),
                LOSS_PYTORCH: count(loss, self._device),
            }
            update()  # creates the optimizer's state, which must not be counted
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
    """Returns one row per phase of a pair.

    Each has the counts of a call, `units` (the samples or pairs in it), the floor of the time per unit in microseconds,
    and the shares of a pair's time and launches by mode.

    Args:
        train: what is trained: "lora" or "full".
        unet: the UNet's configuration.
    """
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
    """Returns how often a pair needs a phase; noising twice, for the reference's forward and for the policy's."""
    _, steps, pairs = MODES[mode]
    if phase == ROUND_TRIP:
        return 1 / pairs
    if phase in (UNET, GUIDANCE, SOLVERS[mode]):
        return steps / pairs
    return {NOISING: 2, **dict.fromkeys(SOLVERS.values(), 0)}.get(phase, 1)


def census_table(result: dict[str, Any]) -> str:
    """Returns the Markdown table of a pair's phases when a LoRA is trained."""
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
        f"`{result['command']}`: LoRA training, {SAMPLES} samples or {PAIRS} pairs at once; MB, GFLOP and floor (at "
        f"{FLOPS / 1e12:.0f} TFLOP/s and {BANDWIDTH / 1e12:.1f} TB/s) per sample or pair; torch {result['torch']}, "
        f"commit {result['commit']}. Guidance, a solver's step and noising take at most {most[0]} of a pair's time "
        f"each and {whole[0]} together, and {most[1]} of its launches each and {whole[1]} together, even when all "
        "weights are trained.",
    ]
    return "\n".join(lines)


def _percent(share: float) -> str:
    if not share:
        return ""
    return f"{100 * share:.2g} %" if share >= 1e-5 else "< 0.001 %"


def main() -> None:
    """Prints the table and writes the result to the requested file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    result = provenance("benchmarks.census") | {"phases": {"lora": census("lora"), "full": census("full")}}
    print(census_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
