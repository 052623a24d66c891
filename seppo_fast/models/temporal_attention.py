"""Attention over the frames of a clip, and motion modules that do not transpose a clip's features in memory.

The motion modules of diffusers transpose the features of a clip, (B F, C, H, W), to tokens (B H W, F, C) and back. If
features are channels_last, tokens (B, F, P, C) with P = H W are a view of them. Norms, linear layers and the
feed-forward treat each token by itself, so only the positional embedding and the attention need to know which dim holds
the frames. An attention processor alone cannot avoid the transposes, because the module makes them before it calls the
processor. So modules and blocks get a forward of their own, which computes the same values. Attention reads its inputs
by their strides; see `kernels/temporal_attention.py`.

For N = B F P C, diffusers' forward of a module reads and writes these elements and this one does not: 4 N for the two
transposes, and 4 N for the divisions by one after its two attentions; as much again in the backward. The output stays
channels_last, so the convolution after it needs no transpose either (2 N). On CUDA, in both versions, PyTorch's
GroupNorm makes its input contiguous and returns it so: one of the two transposes, 2 N, remains, in the dtype of the
linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

import seppo_fast.kernels.eager as eager
from seppo_fast._loss_arguments import Backend, check_tensor, kernels_for
from seppo_fast.models.attention import ChunkedAttention
from seppo_fast.models.recompute import Recomputed
from seppo_fast.utils.errors import ConfigError

MOST_FRAMES, MOST_WIDTH = 32, 160
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TemporalBackend = Literal["sdpa", "triton", "torch"]


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
    """Computes `softmax(q k^T / sqrt(D)) v` over the F frames of B clips, at each of P positions, in each of H heads.

    The inputs are read in place, without copies. Each may have its own strides, except that the last dim must have
    stride 1.

    Args:
        q: the queries: (B, F, P, H, D) float32, bfloat16 or float16, with F up to 32 and D up to 160.
        k: the keys, of the same shape, dtype and device.
        v: the values, of the same shape, dtype and device.
        backend: `torch`, `triton` or `auto`, which uses Triton for CUDA tensors if Triton is installed and the GPU has
            compute capability 8.0 or newer, else PyTorch.

    Returns:
        (B, F, P, H, D) of the same dtype, in the memory layout of `q` if Triton computes it. Differentiable in all
        three inputs.

    Raises:
        ValueError: A shape, dtype, device or stride is not supported; the backend is unknown or cannot run on the
            device.
    """
    _check_inputs(q, k, v)
    if kernels_for(backend, q.device) is eager:
        return eager.temporal_attention(q, k, v)
    import seppo_fast.kernels.temporal_attention as kernels

    return kernels.temporal_attention(q, k, v)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensor("q", q)
    if q.ndim != 5 or q.numel() == 0:
        raise ValueError(f"q: expected a non-empty tensor (B, F, P, H, D), got shape {tuple(q.shape)}")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q: expected dtype float32, bfloat16 or float16, got {q.dtype}")
    if q.shape[1] > MOST_FRAMES or q.shape[4] > MOST_WIDTH:
        raise ValueError(
            f"q: at most {MOST_FRAMES} frames and a head width of at most {MOST_WIDTH} are supported, got "
            f"{q.shape[1]} frames and a head width of {q.shape[4]}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if (x.shape, x.dtype, x.device) != (q.shape, q.dtype, q.device):
            raise ValueError(
                f"{name}: expected {tuple(q.shape)} {q.dtype} on {q.device}, like q, got {tuple(x.shape)} {x.dtype} on "
                f"{x.device}"
            )
        if x.stride(4) != 1 and x.shape[4] != 1:
            raise ValueError(f"{name}: the last dim must have stride 1, got strides {x.stride()}")


class FrameAttention:
    """A diffusers attention processor in which each token attends to the tokens of all frames at the same position.

    Tokens are (B, F, P, C), or (B P, F, C) as the motion modules of diffusers pass them. The output has the same shape.

    Args:
        backend: the backend of `temporal_attention`.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    # `Attention` passes only the arguments named here, and drops others with a warning.
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("encoder_hidden_states, attention_mask: not supported, each frame attends to all frames")
        tokens = hidden_states if hidden_states.ndim == 4 else hidden_states.unsqueeze(2)
        q, k, v = (layer(tokens).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        out = temporal_attention(q, k, v, self._backend).flatten(-2)
        return attn.to_out[1](attn.to_out[0](out)).view(hidden_states.shape)


class _InPlaceBlock(BasicTransformerBlock):
    """A transformer block of a motion module; its tokens are (B, F, P, C) if `_in_place` is true, else diffusers'."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _in_place(self):
            return super().forward(hidden_states, *args, **kwargs)
        positions = self.pos_embed.pe[:, : hidden_states.shape[1], None]
        for norm, attn in ((self.norm1, self.attn1), (self.norm2, self.attn2)):
            hidden_states = attn(norm(hidden_states) + positions) + hidden_states
        return self.ff(self.norm3(hidden_states)) + hidden_states


class _InPlaceMotionModule(AnimateDiffTransformer3D):
    """A motion module on tokens (B, F, P, C), a view of the normalised features if these are channels_last."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        others = (encoder_hidden_states, timestep, class_labels)
        if not all(map(_in_place, self.transformer_blocks)) or any(x is not None for x in others):
            return super().forward(hidden_states, *others, num_frames, cross_attention_kwargs)
        height, width = hidden_states.shape[2:]
        clips = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2)
        tokens = self.proj_in(self.norm(clips).permute(0, 2, 3, 4, 1).flatten(2, 3))
        for block in self.transformer_blocks:
            tokens = block(tokens)
        features = self.proj_out(tokens).unflatten(2, (height, width)).permute(0, 1, 4, 2, 3).flatten(0, 1)
        return features + hidden_states


def _in_place(block: nn.Module) -> bool:
    """Returns whether a block can run on tokens (B, F, P, C): its processors can, its feed-forward is not chunked."""
    assert isinstance(block, BasicTransformerBlock)
    processors = block.attn1.processor, block.attn2.processor
    return all(isinstance(x, FrameAttention) for x in processors) and block._chunk_size is None


def set_temporal_attention(unet: nn.Module, backend: TemporalBackend) -> None:
    """Sets the backend of the attention over frames in a UNet's motion modules, in place.

    It works with and without a LoRA and gradient checkpointing. If other attention processors are set later, the
    modules run diffusers' own forward again.

    Args:
        unet: a `UNetMotionModel` on the device that it will run on, or a single motion module.
        backend: `sdpa` runs PyTorch's attention in diffusers' own modules, in chunks of rows if the batch is too large
            for its kernels. `triton` runs the fused kernels without transposing features. `torch` runs the kernels'
            PyTorch twin on the same layout, to test that layout without a GPU.

    Raises:
        ValueError: The backend is unknown; the UNet has no motion modules, or some that differ from AnimateDiff's.
        ConfigError: `triton` is requested, but Triton is not installed or the device is not a CUDA device.
    """
    if backend not in get_args(TemporalBackend):
        raise ValueError(f"backend: {backend!r} is unknown, use one of {', '.join(get_args(TemporalBackend))}")
    modules = [(name, x) for name, x in unet.named_modules() if isinstance(x, AnimateDiffTransformer3D)]
    if not modules:
        raise ValueError("unet: it has no motion modules")
    for name, module in modules:
        _check_module(name, module)
    if backend == "triton":
        _check_triton(next(unet.parameters()).device)
    processor: Callable[..., Tensor]
    if backend == "sdpa":
        processor = ChunkedAttention(AttnProcessor2_0())
        of_block, of_module = BasicTransformerBlock, AnimateDiffTransformer3D
    else:
        processor = FrameAttention(backend)
        of_block, of_module = _InPlaceBlock, _InPlaceMotionModule
    for _, module in modules:
        for block in module.transformer_blocks:
            block.attn1.set_processor(processor)
            block.attn2.set_processor(processor)
            _turn_into(block, of_block)
        _turn_into(module, of_module)


def _check_triton(device: torch.device) -> None:
    try:
        kernels_for("triton", device)
    except ValueError as error:
        raise ConfigError(f"model.temporal_attention = triton needs CUDA and triton; use sdpa ({error})") from None


def _check_module(name: str, module: AnimateDiffTransformer3D) -> None:
    """Raises ValueError if the forwards in this file would not compute everything that the module does."""
    for place, part in ((name, module), *((f"{name}.transformer_blocks", x) for x in module.transformer_blocks)):
        if not isinstance(vars(part).get("forward"), Recomputed | None):
            raise ValueError(f"unet: the forward of {place} was replaced, so its attention cannot be changed")
    for block in module.transformer_blocks:
        known = type(block) in (BasicTransformerBlock, _InPlaceBlock) and block.norm_type == "layer_norm"
        known = known and isinstance(block.pos_embed, SinusoidalPositionalEmbedding)
        if not (known and all(map(_is_plain, (block.attn1, block.attn2)))):
            raise ValueError(f"unet: {name} is not built as in AnimateDiff, so its attention cannot be replaced")


def _is_plain(attn: Attention | None) -> bool:
    """Returns whether a layer is plain self-attention: no extra norms, no residual connection, no rescaled output."""
    if attn is None or attn.is_cross_attention or attn.residual_connection or attn.rescale_output_factor != 1:
        return False
    return all(x is None for x in (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k))


def _turn_into(module: nn.Module, kind: type[nn.Module]) -> None:
    """Changes a module's class, and with it its forward; gradient checkpointing stays on if it was on."""
    wrapped = vars(module).pop("forward", None)
    module.__class__ = kind
    if wrapped is not None:
        module.forward = Recomputed(module.forward)
