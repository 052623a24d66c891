"""Names and shapes of the published networks' weights, as facts of the files; no code was copied.

An entry `name:OUTxINxK...` is a convolution; `convolutions` turns a list into names and weight shapes. Sources:

- INCEPTION: pt_inception-2015-12-05-6726825d.pth, as loaded by mseitzer/pytorch-fid (commit 1232cd6, inception.py) into
  torchvision's Inception-v3. Each entry has `conv.weight` and `bn.{weight, bias, running_mean, running_var}`. The file
  also holds the classifier `fc` with 1008 classes, which is not used.
- I3D: i3d_pretrained_400.pt, as loaded by wilson1yan/VideoGPT (commit c6655e8, pytorch_i3d.py, which is that of
  piergiaj/pytorch-i3d). Each entry has `conv3d.weight` and `bn.{...}`; `logits.conv3d` has a bias and no `bn`.
- ALEXNET: torchvision's alexnet-owt-7be5be79.pth, of which richzhang/PerceptualSimilarity (commit 0196579) uses
  `features`; each entry has `weight` and `bias`. HEADS: its weights/v0.1/alex.pth, `weight` alone.
"""

from __future__ import annotations


def convolutions(text: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the convolutions' weights by name."""
    entries = (entry.rpartition(":") for entry in text.split())
    return {name: tuple(int(size) for size in shape.split("x")) for name, _, shape in entries}


INCEPTION = convolutions(
    """
Conv2d_1a_3x3:32x3x3x3 Conv2d_2a_3x3:32x32x3x3 Conv2d_2b_3x3:64x32x3x3 Conv2d_3b_1x1:80x64x1x1
Conv2d_4a_3x3:192x80x3x3 Mixed_5b.branch1x1:64x192x1x1 Mixed_5b.branch5x5_1:48x192x1x1
Mixed_5b.branch5x5_2:64x48x5x5 Mixed_5b.branch3x3dbl_1:64x192x1x1 Mixed_5b.branch3x3dbl_2:96x64x3x3
Mixed_5b.branch3x3dbl_3:96x96x3x3 Mixed_5b.branch_pool:32x192x1x1 Mixed_5c.branch1x1:64x256x1x1
Mixed_5c.branch5x5_1:48x256x1x1 Mixed_5c.branch5x5_2:64x48x5x5 Mixed_5c.branch3x3dbl_1:64x256x1x1
Mixed_5c.branch3x3dbl_2:96x64x3x3 Mixed_5c.branch3x3dbl_3:96x96x3x3 Mixed_5c.branch_pool:64x256x1x1
Mixed_5d.branch1x1:64x288x1x1 Mixed_5d.branch5x5_1:48x288x1x1 Mixed_5d.branch5x5_2:64x48x5x5
Mixed_5d.branch3x3dbl_1:64x288x1x1 Mixed_5d.branch3x3dbl_2:96x64x3x3 Mixed_5d.branch3x3dbl_3:96x96x3x3
Mixed_5d.branch_pool:64x288x1x1 Mixed_6a.branch3x3:384x288x3x3 Mixed_6a.branch3x3dbl_1:64x288x1x1
Mixed_6a.branch3x3dbl_2:96x64x3x3 Mixed_6a.branch3x3dbl_3:96x96x3x3 Mixed_6b.branch1x1:192x768x1x1
Mixed_6b.branch7x7_1:128x768x1x1 Mixed_6b.branch7x7_2:128x128x1x7 Mixed_6b.branch7x7_3:192x128x7x1
Mixed_6b.branch7x7dbl_1:128x768x1x1 Mixed_6b.branch7x7dbl_2:128x128x7x1 Mixed_6b.branch7x7dbl_3:128x128x1x7
Mixed_6b.branch7x7dbl_4:128x128x7x1 Mixed_6b.branch7x7dbl_5:192x128x1x7 Mixed_6b.branch_pool:192x768x1x1
Mixed_6c.branch1x1:192x768x1x1 Mixed_6c.branch7x7_1:160x768x1x1 Mixed_6c.branch7x7_2:160x160x1x7
Mixed_6c.branch7x7_3:192x160x7x1 Mixed_6c.branch7x7dbl_1:160x768x1x1 Mixed_6c.branch7x7dbl_2:160x160x7x1
Mixed_6c.branch7x7dbl_3:160x160x1x7 Mixed_6c.branch7x7dbl_4:160x160x7x1 Mixed_6c.branch7x7dbl_5:192x160x1x7
Mixed_6c.branch_pool:192x768x1x1 Mixed_6d.branch1x1:192x768x1x1 Mixed_6d.branch7x7_1:160x768x1x1
Mixed_6d.branch7x7_2:160x160x1x7 Mixed_6d.branch7x7_3:192x160x7x1 Mixed_6d.branch7x7dbl_1:160x768x1x1
Mixed_6d.branch7x7dbl_2:160x160x7x1 Mixed_6d.branch7x7dbl_3:160x160x1x7 Mixed_6d.branch7x7dbl_4:160x160x7x1
Mixed_6d.branch7x7dbl_5:192x160x1x7 Mixed_6d.branch_pool:192x768x1x1 Mixed_6e.branch1x1:192x768x1x1
Mixed_6e.branch7x7_1:192x768x1x1 Mixed_6e.branch7x7_2:192x192x1x7 Mixed_6e.branch7x7_3:192x192x7x1
Mixed_6e.branch7x7dbl_1:192x768x1x1 Mixed_6e.branch7x7dbl_2:192x192x7x1 Mixed_6e.branch7x7dbl_3:192x192x1x7
Mixed_6e.branch7x7dbl_4:192x192x7x1 Mixed_6e.branch7x7dbl_5:192x192x1x7 Mixed_6e.branch_pool:192x768x1x1
Mixed_7a.branch3x3_1:192x768x1x1 Mixed_7a.branch3x3_2:320x192x3x3 Mixed_7a.branch7x7x3_1:192x768x1x1
Mixed_7a.branch7x7x3_2:192x192x1x7 Mixed_7a.branch7x7x3_3:192x192x7x1 Mixed_7a.branch7x7x3_4:192x192x3x3
Mixed_7b.branch1x1:320x1280x1x1 Mixed_7b.branch3x3_1:384x1280x1x1 Mixed_7b.branch3x3_2a:384x384x1x3
Mixed_7b.branch3x3_2b:384x384x3x1 Mixed_7b.branch3x3dbl_1:448x1280x1x1 Mixed_7b.branch3x3dbl_2:384x448x3x3
Mixed_7b.branch3x3dbl_3a:384x384x1x3 Mixed_7b.branch3x3dbl_3b:384x384x3x1 Mixed_7b.branch_pool:192x1280x1x1
Mixed_7c.branch1x1:320x2048x1x1 Mixed_7c.branch3x3_1:384x2048x1x1 Mixed_7c.branch3x3_2a:384x384x1x3
Mixed_7c.branch3x3_2b:384x384x3x1 Mixed_7c.branch3x3dbl_1:448x2048x1x1 Mixed_7c.branch3x3dbl_2:384x448x3x3
Mixed_7c.branch3x3dbl_3a:384x384x1x3 Mixed_7c.branch3x3dbl_3b:384x384x3x1 Mixed_7c.branch_pool:192x2048x1x1
"""
)
INCEPTION_UNUSED = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}

I3D = convolutions(
    """
Conv3d_1a_7x7:64x3x7x7x7 Conv3d_2b_1x1:64x64x1x1x1 Conv3d_2c_3x3:192x64x3x3x3 Mixed_3b.b0:64x192x1x1x1
Mixed_3b.b1a:96x192x1x1x1 Mixed_3b.b1b:128x96x3x3x3 Mixed_3b.b2a:16x192x1x1x1 Mixed_3b.b2b:32x16x3x3x3
Mixed_3b.b3b:32x192x1x1x1 Mixed_3c.b0:128x256x1x1x1 Mixed_3c.b1a:128x256x1x1x1 Mixed_3c.b1b:192x128x3x3x3
Mixed_3c.b2a:32x256x1x1x1 Mixed_3c.b2b:96x32x3x3x3 Mixed_3c.b3b:64x256x1x1x1 Mixed_4b.b0:192x480x1x1x1
Mixed_4b.b1a:96x480x1x1x1 Mixed_4b.b1b:208x96x3x3x3 Mixed_4b.b2a:16x480x1x1x1 Mixed_4b.b2b:48x16x3x3x3
Mixed_4b.b3b:64x480x1x1x1 Mixed_4c.b0:160x512x1x1x1 Mixed_4c.b1a:112x512x1x1x1 Mixed_4c.b1b:224x112x3x3x3
Mixed_4c.b2a:24x512x1x1x1 Mixed_4c.b2b:64x24x3x3x3 Mixed_4c.b3b:64x512x1x1x1 Mixed_4d.b0:128x512x1x1x1
Mixed_4d.b1a:128x512x1x1x1 Mixed_4d.b1b:256x128x3x3x3 Mixed_4d.b2a:24x512x1x1x1 Mixed_4d.b2b:64x24x3x3x3
Mixed_4d.b3b:64x512x1x1x1 Mixed_4e.b0:112x512x1x1x1 Mixed_4e.b1a:144x512x1x1x1 Mixed_4e.b1b:288x144x3x3x3
Mixed_4e.b2a:32x512x1x1x1 Mixed_4e.b2b:64x32x3x3x3 Mixed_4e.b3b:64x512x1x1x1 Mixed_4f.b0:256x528x1x1x1
Mixed_4f.b1a:160x528x1x1x1 Mixed_4f.b1b:320x160x3x3x3 Mixed_4f.b2a:32x528x1x1x1 Mixed_4f.b2b:128x32x3x3x3
Mixed_4f.b3b:128x528x1x1x1 Mixed_5b.b0:256x832x1x1x1 Mixed_5b.b1a:160x832x1x1x1 Mixed_5b.b1b:320x160x3x3x3
Mixed_5b.b2a:32x832x1x1x1 Mixed_5b.b2b:128x32x3x3x3 Mixed_5b.b3b:128x832x1x1x1 Mixed_5c.b0:384x832x1x1x1
Mixed_5c.b1a:192x832x1x1x1 Mixed_5c.b1b:384x192x3x3x3 Mixed_5c.b2a:48x832x1x1x1 Mixed_5c.b2b:128x48x3x3x3
Mixed_5c.b3b:128x832x1x1x1
"""
)
I3D_LOGITS = {"logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}

ALEXNET = convolutions(
    """
features.0:64x3x11x11 features.3:192x64x5x5 features.6:384x192x3x3 features.8:256x384x3x3 features.10:256x256x3x3
"""
)
ALEXNET_UNUSED = {
    "classifier.1.weight": (4096, 9216),
    "classifier.1.bias": (4096,),
    "classifier.4.weight": (4096, 4096),
    "classifier.4.bias": (4096,),
    "classifier.6.weight": (1000, 4096),
    "classifier.6.bias": (1000,),
}
HEADS = {f"lin{layer}.model.1": (1, shape[0], 1, 1) for layer, shape in enumerate(ALEXNET.values())}


def normalised(convs: dict[str, tuple[int, ...]], conv: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all weights of convolutions `<name>.<conv>` with batch normalisation `<name>.bn`."""
    shapes = {f"{name}.{conv}.weight": shape for name, shape in convs.items()}
    statistics = ("weight", "bias", "running_mean", "running_var")
    return shapes | {f"{name}.bn.{part}": shape[:1] for name, shape in convs.items() for part in statistics}
