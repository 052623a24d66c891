"""The policy: which weights of the UNet are trained, and how they are compiled."""

from __future__ import annotations

import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from seppo_fast.config.schema import ModelConfig
from seppo_fast.models.family import UNet
from seppo_fast.models.recompute import enable_checkpointing
from seppo_fast.utils.random import keyed_rng

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
_MOTION = "motion_modules"  # in the names of all that lies in motion modules


def make_trainable(unet: UNet, config: ModelConfig, seed: int) -> None:
    """Marks the weights that are trained, in place, on a float32 UNet; they stay float32 whatever the compute dtype.

    For a LoRA the frozen base is kept in the compute dtype, and the adapter (rank r, alpha r) starts as a zero
    change: B is zero, A normal with standard deviation 1/r (peft's `gaussian`), as a function of the seed.
    """
    unet.requires_grad_(False)
    if config.train == "full":
        unet.requires_grad_(True)
    else:
        for parameter in unet.parameters():  # not the buffers: positions stay as they were trained
            parameter.data = parameter.data.to(DTYPES[config.precision])
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_rank,
            init_lora_weights="gaussian",
            target_modules=_lora_targets(unet, config.lora_on),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(keyed_rng(seed, "lora").integers(2**32)))
            unet.add_adapter(lora)
        for parameter in trainable(unet).values():
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        enable_checkpointing(unet)
    unet.eval()  # no dropout: the policy and its past selves must predict alike


def _lora_targets(unet: nn.Module, where: str) -> list[str]:
    """Names, or their ends, of the layers that get a LoRA: those of all attention, of the spatial, of the temporal."""
    if where == "both":
        return _LORA_TARGETS
    ends = tuple(f".{target}" for target in _LORA_TARGETS)
    names = [name for name, _ in unet.named_modules() if name.endswith(ends)]
    return [name for name in names if (_MOTION in name.split(".")) == (where == "motion")]


def compile_blocks(unet: UNet, attention: str) -> None:
    """torch.compile of the transformer blocks, which repeat, in place, where they are called next.

    Every shape is compiled for itself: code for any shape rounds otherwise, and which of two codes takes a shape that
    fits both depends on which came last, so that equal weights would not give equal errors.
    """
    torch._dynamo.config.recompile_limit = 256  # shapes and grad modes of all blocks count together; the default is 8
    torch._dynamo.config.accumulated_recompile_limit = 1024
    # Keeps the roundings to half precision that a fused kernel would leave out: the policy casts its weights at each
    # use and a reference holds them cast, and equal weights must give equal errors.
    torch._inductor.config.emulate_precision_casts = True
    # PyTorch's own attention compiles whole; xformers may break the graph where it is called, and runs as it is.
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.compile(fullgraph=attention == "sdpa", dynamic=False)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, live."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def lora_weights(unet: UNet) -> dict[str, Tensor]:
    """The adapter's tensors under the names that diffusers' `save_lora_weights` expects."""
    return get_peft_model_state_dict(unet)
