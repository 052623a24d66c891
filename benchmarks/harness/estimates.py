"""Estimates how long cases take on an H200, which `--minutes` plans with. Nothing here is measured.

Work is counted (`benchmarks.census`, `benchmarks.harness.counters`) and divided by assumed rates, which are below the
device's limits. A call takes at least as long as the host needs to launch its operations. Set-up times are assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

BF16, FP32 = 250.0, 35.0  # assumed TFLOP/s of UNets in eager mode
MEMORY = 4300.0  # GB/s
LAUNCH = 15e-6  # host seconds per operation, including the Python code around it

# Assumed set-up times in seconds.
WRITE_PIPELINE = 20.0  # 4.3 GB of random weights, generated and written
WRITE_ADAPTER = 8.0  # 1.8 GB
PIPELINE, CLIP_PIPELINE = 4.0, 6.0  # read from the page cache, or copied, and moved to the device
TRAINER, CLIP_TRAINER = 14.0, 20.0  # the same, plus hashing its files and encoding the data
COMPILED_GRAPH = 10.0  # a transformer block at one shape, including its backward if it has one
COMPILED_UNET = 60.0


@dataclass(frozen=True)
class Unet:
    """Counted work for one latent, and assumed loading times.

    Attributes:
        forward: TFLOP of a forward.
        trained: TFLOP of forward and backward, by `model.train`.
        pipeline: seconds to load a pipeline.
        trainer: seconds to create a trainer.
    """

    forward: float
    trained: dict[str, float]
    pipeline: float = PIPELINE
    trainer: float = TRAINER


PICTURE = Unet(0.803, {"lora": 1.718, "full": 2.407})  # SD-1.5 at 512 px
CLIPS = {  # with motion modules, 16 frames, by resolution
    256: Unet(4.106, {"lora": 8.298}, CLIP_PIPELINE, CLIP_TRAINER),
    512: Unet(17.75, {"lora": 37.45}, CLIP_PIPELINE, CLIP_TRAINER),
}

# Operations of SD-1.5's UNet that launch kernels, at any batch size: forward; forward and backward by `model.train`.
FORWARD_LAUNCHES = 732
STEP_LAUNCHES = {"lora": 3536, "full": 2750}


def h200(*, bf16: float = 0.0, fp32: float = 0.0, gb: float = 0.0, launches: float = 0.0, setup: float = 0.0) -> float:
    """Returns the estimated seconds on an H200.

    Args:
        bf16: TFLOP in bfloat16.
        fp32: TFLOP in float32.
        gb: 10^9 bytes read from or written to device memory.
        launches: operations that the host launches.
        setup: seconds of set-up, which overlap with nothing.
    """
    return setup + max(bf16 / BF16 + fp32 / FP32 + gb / MEMORY, launches * LAUNCH)
