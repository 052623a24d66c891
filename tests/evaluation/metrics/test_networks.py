"""The feature networks on random weights of the published shapes, and the files that they refuse."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from seppo_fast.evaluation.metrics import alexnet, i3d, inception, keys
from seppo_fast.evaluation.metrics.networks import Unit, in_batches, read_weights
from seppo_fast.utils.errors import ConfigError
from tests.helpers.networks import random_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def inception_file(folder):
    save_file(random_weights(keys.normalised(keys.INCEPTION, "conv"), 1), folder / "inception.safetensors")
    return folder / "inception.safetensors"


@pytest.fixture(scope="module")
def i3d_file(folder):
    shapes = keys.normalised(keys.I3D, "conv3d") | keys.I3D_LOGITS
    save_file(random_weights(shapes, 2), folder / "i3d.safetensors")
    return folder / "i3d.safetensors"


@pytest.fixture(scope="module")
def lpips_files(folder):
    shapes = {f"{name}.weight": shape for name, shape in keys.ALEXNET.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in keys.ALEXNET.items()}
    save_file(random_weights(shapes, 3), folder / "alexnet.safetensors")
    heads = random_weights({f"{name}.weight": shape for name, shape in keys.HEADS.items()}, 4)
    save_file({name: values.abs() for name, values in heads.items()}, folder / "heads.safetensors")
    return folder / "alexnet.safetensors", folder / "heads.safetensors"


# The lists of names and shapes


def total(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_the_lists_have_the_published_numbers_of_parameters():
    """torchvision's Inception-v3 without its second head and with 1008 classes; AlexNet; I3D in its Keras port."""
    channels = sum(shape[0] for shape in keys.INCEPTION.values())
    assert total(keys.INCEPTION) + 2 * channels + total(keys.INCEPTION_UNUSED) == 27_161_264 - 3_326_696 + 8 * 2049
    biases = sum(shape[0] for shape in keys.ALEXNET.values())
    assert total(keys.ALEXNET) + biases + total(keys.ALEXNET_UNUSED) == 61_100_840
    channels = sum(shape[0] for shape in keys.I3D.values())
    assert total(keys.I3D) + 2 * channels + total(keys.I3D_LOGITS) == 12_697_264
    assert [len(names) for names in (keys.INCEPTION, keys.I3D, keys.ALEXNET, keys.HEADS)] == [94, 57, 5, 5]


# Files


def test_a_file_may_hold_the_classifier_and_batch_counters(tmp_path, lpips_files):
    shapes = {"a.conv.weight": (2, 3, 1, 1)}
    weights = random_weights(shapes, 1) | {"fc.bias": torch.zeros(4), "a.bn.num_batches_tracked": torch.tensor(7)}
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "w.safetensors")
    read = read_weights(tmp_path / "w.safetensors", shapes, {"fc.bias": (4,)}, "Net")
    assert list(read) == ["a.conv.weight"] and read["a.conv.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"Mixed_5b.branch_pool.conv.weight": None},
            "lacks 1 weights, the first is 'Mixed_5b.branch_pool.conv.weight'",
        ),
        ({"AuxLogits.fc.bias": (3,)}, "holds 1 unknown weights, the first is 'AuxLogits.fc.bias'"),
        (
            {"Mixed_7c.branch1x1.bn.bias": (321,)},
            r"'Mixed_7c.branch1x1.bn.bias' in .* has shape \(321,\), expected \(320,\)",
        ),
        ({"fc.bias": (1000,)}, r"'fc.bias' in .* has shape \(1000,\), expected \(1008,\)"),
    ],
)
def test_missing_surplus_and_misshapen_weights_are_named(tmp_path, change, message):
    shapes = keys.normalised(keys.INCEPTION, "conv") | change
    # Half precision, all from one small tensor, so that the file is written fast.
    weights = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items() if shape}
    save_file(weights, tmp_path / "inception.safetensors")
    with pytest.raises(ConfigError, match=message):
        inception.load_inception(tmp_path / "inception.safetensors", CPU)


def test_pickles_and_missing_files_are_refused(tmp_path):
    pickled = tmp_path / "i3d_pretrained_400.pt"
    torch.save({"a": torch.zeros(1)}, pickled)
    with pytest.raises(ConfigError, match="pickles and TorchScript can run code"):
        i3d.load_i3d(pickled, CPU)
    pickled.rename(tmp_path / "renamed.safetensors")
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        i3d.load_i3d(tmp_path / "renamed.safetensors", CPU)
    with pytest.raises(ConfigError, match="does not exist"):
        i3d.load_i3d(pickled, CPU)


def test_loading_draws_no_random_numbers(lpips_files):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network = alexnet.load_lpips(*lpips_files, CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


# Units


@pytest.mark.parametrize("shape", [(5, 3, 1, 7), (4, 3, 3, 3), (4, 3, 3, 3, 3)])
def test_a_unit_is_convolution_normalisation_and_relu(shape):
    unit = Unit(shape).double().eval()
    values = random_weights({name: tuple(tensor.shape) for name, tensor in unit.state_dict().items()}, 6)
    unit.load_state_dict({name: tensor + 0.5 * (tensor.ndim == 1) for name, tensor in values.items()}, strict=False)
    weights = {name: tensor.numpy() for name, tensor in unit.state_dict().items()}
    kernel = shape[2:]
    x = np.random.default_rng(7).standard_normal((2, 3, 5, 7, 9)[: 2 + len(kernel)])
    padded = np.pad(x, [(0, 0), (0, 0), *((size // 2, size // 2) for size in kernel)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=tuple(range(2, x.ndim)))
    letters = "yz" if len(kernel) == 2 else "xyz"
    name = "conv" if len(kernel) == 2 else "conv3d"
    inner = {"yz": "nihwyz,oiyz->nohw", "xyz": "nithwxyz,oixyz->nothw"}[letters]
    convolved = np.einsum(inner, windows, weights[f"{name}.weight"])
    bend = [
        weights[f"bn.{part}"].reshape(-1, *[1] * len(kernel))
        for part in ("weight", "bias", "running_mean", "running_var")
    ]
    expected = np.maximum((convolved - bend[2]) / np.sqrt(bend[3] + 1e-3) * bend[0] + bend[1], 0)
    with torch.no_grad():
        np.testing.assert_allclose(unit(torch.from_numpy(x)).numpy(), expected, rtol=1e-10, atol=1e-12)


# Inception


def reference_pool(x: np.ndarray, reduce) -> np.ndarray:
    """Pools (N, C, H, W) over 3 x 3 neighbourhoods, over existing pixels alone, pixel by pixel."""
    pooled = np.empty_like(x)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            pooled[:, :, i, j] = reduce(x[:, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2], (2, 3))
    return pooled


def pool_branch(network, block: str, pooled: np.ndarray) -> np.ndarray:
    """Applies the pooling branch's 1 x 1 unit in numpy."""
    part = {
        name.rpartition(".")[2]: value.numpy()
        for name, value in network.get_submodule(f"{block}.branch_pool").state_dict().items()
        if "bn" in name
    }
    weight = network.get_submodule(f"{block}.branch_pool").conv.weight.numpy()[:, :, 0, 0]
    convolved = np.einsum("nchw,oc->nohw", pooled, weight)
    bend = [part[name][:, None, None] for name in ("weight", "bias", "running_mean", "running_var")]
    return np.maximum((convolved - bend[2]) / np.sqrt(bend[3] + 1e-3) * bend[0] + bend[1], 0)


@pytest.fixture(scope="module")
def double_inception(inception_file):
    return inception.load_inception(inception_file, CPU).double()


@pytest.mark.parametrize(
    ("block", "channels", "out"),
    [("Mixed_5b", 192, 32), ("Mixed_6c", 768, 192), ("Mixed_7b", 1280, 192), ("Mixed_7c", 2048, 192)],
)
def test_pooling_branches_leave_the_padding_out_and_the_last_takes_maxima(double_inception, block, channels, out):
    x = np.random.default_rng(8).standard_normal((2, channels, 5, 7)) - 1  # padding with zeros would be seen
    seen = []
    hook = double_inception.get_submodule(f"{block}.branch_pool").register_forward_hook(
        lambda *arguments: seen.append(arguments[2])
    )
    source = torch.from_numpy(x)
    with torch.no_grad():
        if block == "Mixed_5b":
            whole = double_inception.block_5(source, block)
        elif block == "Mixed_6c":
            whole = double_inception.block_6(source, block)
        else:
            last = block == "Mixed_7c"
            pooled = F.max_pool2d(source, 3, 1, padding=1) if last else inception.average_pool(source)
            whole = double_inception.block_7(source, block, pooled)
    hook.remove()
    expected = pool_branch(double_inception, block, reference_pool(x, np.max if block == "Mixed_7c" else np.mean))
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(whole[:, -out:].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert whole.shape[2:] == (5, 7)


def test_the_whole_network(inception_file):
    """Grids of 35, 17 and 8 as in Szegedy et al. 2015; the two last blocks get an average and a maximum."""
    network = inception.load_inception(inception_file, CPU)
    seen = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _, given, made, name=name: seen.update({name: (given[0], made)})
        )
        for name in keys.INCEPTION
    ]
    pictures = np.random.default_rng(9).integers(0, 256, (3, 33, 47, 3), dtype=np.uint8)
    values = in_batches(lambda batch: inception.features(network, batch), pictures, 2)
    for hook in hooks:
        hook.remove()
    assert values.shape == (3, 2048) and values.dtype == np.float32 and np.isfinite(values).all()
    sizes = {name: made.shape[2:] for name, (_, made) in seen.items()}
    assert sizes["Conv2d_1a_3x3"] == (149, 149) and sizes["Conv2d_2b_3x3"] == (147, 147)
    assert sizes["Conv2d_4a_3x3"] == (71, 71)
    for name, size in sizes.items():
        if name.startswith("Mixed") and "6a" not in name and "7a" not in name:
            assert size == ({"5": 35, "6": 17, "7": 8}[name[6]],) * 2, name
    for block, pool in (("Mixed_7b", np.mean), ("Mixed_7c", np.max)):
        x = seen[f"{block}.branch1x1"][0].numpy()
        np.testing.assert_allclose(
            seen[f"{block}.branch_pool"][0].numpy(), reference_pool(x, pool), rtol=1e-5, atol=1e-6
        )
    last = [
        seen[f"Mixed_7c.{name}"][1]
        for name in ("branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool")
    ]
    np.testing.assert_allclose(values[2:], torch.cat(last, 1).mean((2, 3)).numpy(), rtol=1e-5)
    clean = inception.features(network, pictures[:1], clean=True)
    assert not np.allclose(clean, values[:1], rtol=1e-3)
    np.testing.assert_allclose(inception.features(network, pictures[1:2]), values[1:2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(5, 7), (13, 4), (11, 11)])
def test_the_resize_of_tensorflow(size):
    pictures = np.random.default_rng(10).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    resized = inception.tensorflow_resize(torch.from_numpy(pictures), 11).numpy()
    expected = np.empty((2, 3, 11, 11))
    for i in range(11):
        for j in range(11):
            y, x = i * size[0] / 11, j * size[1] / 11
            top, left = math.floor(y), math.floor(x)
            low, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
            corners = [pictures[:, a, b].astype(np.float64) for a in (top, low) for b in (left, right)]
            above = corners[0] + (corners[1] - corners[0]) * (x - left)
            below = corners[2] + (corners[3] - corners[2]) * (x - left)
            expected[:, :, i, j] = above + (below - above) * (y - top)
    np.testing.assert_allclose(resized, expected, rtol=1e-5, atol=2e-4)


def bicubic(size: int, side: int) -> np.ndarray:
    """Returns the matrix (side, size) of an antialiased bicubic filter, a = -0.5."""
    scale = max(size / side, 1.0)
    centres = (np.arange(side)[:, None] + 0.5) * size / side
    distance = abs((np.arange(size) + 0.5 - centres) / scale)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def test_the_resize_of_clean_fid():
    pictures = np.random.default_rng(11).integers(0, 256, (2, 40, 9, 3), dtype=np.uint8)
    pictures[0] //= 255  # pictures of 0 and 1: nothing is rounded to whole numbers
    resized = inception.clean_resize(pictures, 13).numpy()
    exact = np.einsum("yh,nhwc,xw->ncyx", bicubic(40, 13), pictures.astype(np.float64), bicubic(9, 13))
    np.testing.assert_allclose(resized, exact.clip(0, 255), rtol=1e-4, atol=1e-3)
    rounded = np.asarray(Image.fromarray(pictures[0]).resize((13, 13), Image.Resampling.BICUBIC))
    assert abs(resized[0] - rounded.transpose(2, 0, 1)).max() > 0.2


def test_wrong_pictures_are_refused(double_inception):
    pictures = np.zeros((1, 9, 9, 3), np.uint8)
    for bad in (pictures[0], pictures.astype(float), pictures[..., :1], pictures[None]):
        with pytest.raises(ValueError, match="pictures: expected uint8"):
            inception.features(double_inception, bad)
    with pytest.raises(ValueError, match="at least 1"):
        in_batches(lambda x: x, pictures[:0], 2)


# LPIPS


def reference_lpips(files, a: np.ndarray, b: np.ndarray, spatial: bool) -> np.ndarray:
    """Computes LPIPS of uint8 (N, H, W, 3) in float64, from the description of the paper's layers."""
    with open(files[0], "rb"):
        weights = {name: tensor.double() for file in files for name, tensor in _load(file).items()}
    maps = []
    for pictures in (a, b):
        x = torch.from_numpy(pictures).double().permute(0, 3, 1, 2) / 127.5 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).double().view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).double().view(3, 1, 1)
        outputs = []
        for number, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if number in (3, 6):
                x = F.max_pool2d(x, 3, 2)
            x = F.conv2d(
                x, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], stride, padding
            ).clamp(min=0)
            outputs.append((x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-10)).numpy())
        maps.append(outputs)
    total = np.zeros(len(a))
    for layer, (x, y) in enumerate(zip(*maps)):
        difference = np.einsum("nchw,c->nhw", (x - y) ** 2, weights[f"lin{layer}.model.1.weight"].numpy()[0, :, 0, 0])
        if spatial:
            difference = F.interpolate(torch.from_numpy(difference)[:, None], a.shape[1:3], mode="bilinear").numpy()[
                :, 0
            ]
        total += difference.mean((1, 2))
    return total


def _load(file) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.parametrize("spatial", [False, True])
def test_lpips_is_the_published_formula(lpips_files, spatial):
    rng = np.random.default_rng(12)
    a = rng.integers(0, 256, (3, 47, 61, 3), dtype=np.uint8)
    b = np.clip(a + rng.integers(-50, 50, a.shape), 0, 255).astype(np.uint8)
    network = alexnet.load_lpips(*lpips_files, CPU)
    values = alexnet.lpips(network, a, b, spatial=spatial, batch=2)
    np.testing.assert_allclose(values, reference_lpips(lpips_files, a, b, spatial), rtol=1e-4)
    np.testing.assert_allclose(values, alexnet.lpips(network, b, a, spatial=spatial), rtol=1e-5)
    assert (alexnet.lpips(network, a, a) == 0).all() and values.dtype == np.float64


def test_lpips_of_a_clip_is_the_mean_over_frames(lpips_files):
    network = alexnet.load_lpips(*lpips_files, CPU)
    a, b = (np.random.default_rng(seed).integers(0, 256, (2, 3, 31, 33, 3), dtype=np.uint8) for seed in (1, 2))
    frames = np.array([alexnet.lpips(network, x, y) for x, y in zip(a, b)])
    np.testing.assert_allclose(alexnet.lpips(network, a, b), frames.mean(1), rtol=1e-6)
    for bad in (b[:1], b[..., :1], b[0]):
        with pytest.raises(ValueError, match="a, b"):
            alexnet.lpips(network, a, bad)
    with pytest.raises(ValueError, match="at least 31"):
        alexnet.lpips(network, a[:, :, :30], b[:, :, :30])
    with pytest.raises(ValueError, match="uint8"):
        alexnet.lpips(network, a, b.astype(float))


# I3D


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))],
)
@pytest.mark.parametrize("size", [(5, 7, 6), (2, 3, 9)])
def test_max_pooling_pads_as_tensorflow(kernel, stride, size):
    """Output i covers the inputs from i * stride - before on; what is missing is split, the larger part at the end."""
    x = np.random.default_rng(13).standard_normal((2, 3, *size)).clip(0)
    shape = [-(-length // step) for length, step in zip(size, stride)]
    before = [max((n - 1) * step + wide - length, 0) // 2 for n, step, wide, length in zip(shape, stride, kernel, size)]
    expected = np.zeros((2, 3, *shape))
    for place in np.ndindex(*shape):
        starts = [i * step - pad for i, step, pad in zip(place, stride, before)]
        t, h, w = (slice(max(start, 0), start + wide) for start, wide in zip(starts, kernel))
        expected[(slice(None), slice(None), *place)] = x[:, :, t, h, w].max((2, 3, 4))
    np.testing.assert_array_equal(i3d.max_pool(torch.from_numpy(x), kernel, stride).numpy(), expected)


def test_the_whole_i3d(i3d_file):
    network = i3d.load_i3d(i3d_file, CPU)
    seen = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda _, given, made, name=name: seen.update({name: made}))
        for name in keys.I3D
    ]
    clips = np.random.default_rng(14).integers(0, 256, (1, 10, 20, 30, 3), dtype=np.uint8)
    values = i3d.features(network, clips)
    for hook in hooks:
        hook.remove()
    assert values.shape == (1, 400) and values.dtype == np.float32 and np.isfinite(values).all()
    sizes = {name: tuple(made.shape[2:]) for name, made in seen.items()}
    assert sizes["Conv3d_1a_7x7"] == (5, 112, 112) and sizes["Conv3d_2c_3x3"] == (5, 56, 56)
    for block, size in (("3b", (5, 28, 28)), ("4b", (3, 14, 14)), ("4f", (3, 14, 14)), ("5b", (2, 7, 7))):
        assert sizes[f"Mixed_{block}.b3b"] == size
    top = torch.cat([seen[f"Mixed_5c.{branch}"] for branch in ("b0", "b1b", "b2b", "b3b")], 1).mean((2, 3, 4)).numpy()
    weight = network.get_submodule("logits.conv3d").weight.numpy()[:, :, 0, 0, 0]
    expected = top @ weight.T + network.get_submodule("logits.conv3d").bias.numpy()
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="at least 10 frames, got 9"):
        i3d.features(network, clips[:, :9])


def test_a_block_of_i3d_equals_its_branches_in_float64(i3d_file):
    network = i3d.load_i3d(i3d_file, CPU).double()
    x = torch.from_numpy(np.random.default_rng(15).standard_normal((1, 192, 3, 5, 4)).clip(0))
    weights = network.state_dict()

    def unit(x, name):
        kernel = weights[f"Mixed_3b.{name}.conv3d.weight"]
        y = F.conv3d(x, kernel, padding=kernel.shape[-1] // 2)
        mean, variance, scale, shift = (
            weights[f"Mixed_3b.{name}.bn.{part}"].view(-1, 1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((y - mean) / (variance + 1e-3).sqrt() * scale + shift).clamp(min=0)

    with torch.no_grad():
        pooled = F.max_pool3d(x, 3, 1, padding=1)
        branches = [unit(x, "b0"), unit(unit(x, "b1a"), "b1b"), unit(unit(x, "b2a"), "b2b"), unit(pooled, "b3b")]
        np.testing.assert_allclose(
            network.mixed(x, "Mixed_3b").numpy(), torch.cat(branches, 1).numpy(), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("size", [(9, 14), (14, 9), (5, 5)])
def test_clips_are_scaled_to_the_shorter_side_and_cropped(size):
    clips = np.random.default_rng(16).integers(0, 256, (2, 3, *size, 3), dtype=np.uint8)
    made = i3d.prepared(torch.from_numpy(clips), 6).numpy()
    tall, wide = (6 if length == min(size) else math.ceil(length * 6 / min(size)) for length in size)
    grids = []
    for length, out in zip(size, (tall, wide)):
        place = np.maximum((np.arange(out) + 0.5) * length / out - 0.5, 0)  # no antialiasing, no aligned corners
        low = np.floor(place).astype(int)
        matrix = np.zeros((out, length))
        matrix[np.arange(out), low] += 1 - (place - low)
        matrix[np.arange(out), np.minimum(low + 1, length - 1)] += place - low
        grids.append(matrix)
    whole = np.einsum("yh,nfhwc,xw->ncfyx", grids[0], clips / 255, grids[1]) * 2 - 1
    top, left = (tall - 6) // 2, (wide - 6) // 2
    np.testing.assert_allclose(made, whole[..., top : top + 6, left : left + 6], rtol=1e-4, atol=1e-5)
