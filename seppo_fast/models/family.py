"""Model families: load, encode, denoise, decode. Nothing outside this folder knows a model's parts."""

from diffusers import UNet2DConditionModel, UNetMotionModel

UNet = UNet2DConditionModel | UNetMotionModel
"""What a family trains."""
