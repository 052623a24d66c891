"""The policy: which weights of the network are trained, and how they are compiled."""

from __future__ import annotations

import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from seppo_fast.config.schema import ModelConfig
from seppo_fast.models.family import Family
from seppo_fast.utils.random import keyed_rng

LORA_LAYER, LORA_LINEAR = LoraLayer, Linear
"""The classes of the layers that `make_trainable` puts in the place of others: any LoRA layer, a linear one."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_trainable(model: nn.Module, config: ModelConfig, seed: int, family: Family | type[Family]) -> None:
    """Prepares a float32 network for training, in place: marks the weights to train, adds a LoRA if configured.

    Trained weights stay float32 whatever the compute dtype. For a LoRA, the frozen base is cast to the compute dtype.
    The adapter has rank r and alpha r and starts as a zero change: B is zero, and A is normal with standard deviation
    1/r (peft's `gaussian`), drawn from the seed.

    Args:
        model: the network.
        config: the `model` section of the run's configuration.
        seed: the run's seed.
        family: the network's family, or its class.
    """
    model.requires_grad_(False)
    if config.train == "full":
        model.requires_grad_(True)
    else:
        for parameter in model.parameters():  # not the buffers: positional embeddings keep their precision
            parameter.data = parameter.data.to(DTYPES[config.precision])
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_rank,
            init_lora_weights="gaussian",
            target_modules=family.lora_targets(model, config.lora_on),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(keyed_rng(seed, "lora").integers(2**32)))
            model.add_adapter(lora)  # type: ignore[operator] # diffusers' mix-in
        for parameter in trainable(model).values():
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        family.recompute(model)
    model.eval()  # no dropout: the policy and its past checkpoints must predict alike


def compile_blocks(model: nn.Module, attention: str, family: Family | type[Family]) -> None:
    """Applies torch.compile to the repeated blocks, in place. Each block is compiled when it is next called.

    Every input shape is compiled separately. Code for dynamic shapes rounds differently, and which of two compiled
    versions runs a shape that fits both depends on which was compiled last, so equal weights would not give equal
    errors.
    """
    torch._dynamo.config.recompile_limit = 256  # counts shapes and grad modes of all blocks together; the default is 8
    torch._dynamo.config.accumulated_recompile_limit = 1024
    # Keeps the roundings to half precision that a fused kernel would skip: the policy casts its weights at each use, a
    # reference stores them already cast, and equal weights must give equal errors.
    torch._inductor.config.emulate_precision_casts = True
    # PyTorch's own attention compiles as part of the block's graph; xformers may break the graph and run uncompiled.
    for module in model.modules():
        if isinstance(module, family.compiled):
            module.compile(fullgraph=attention == "sdpa", dynamic=False)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained parameters by name: the parameters themselves, not copies."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the adapter's tensors under the names that diffusers' `save_lora_weights` expects."""
    return get_peft_model_state_dict(model)


def make_ema(module: nn.Module, decay: float) -> EMAModel | None:
    """Returns a moving average of the trained weights, for export; None if it is off (decay 0)."""
    return EMAModel(trainable(module).values(), decay=decay) if decay else None
