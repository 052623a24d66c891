"""The losses of per-row numbers against their textbook forms by autograd, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from seppo_fast.kernels.eager import denoising_errors
from seppo_fast.loss import preference_loss
from seppo_fast.methods.losses.kto import kto, kto_offset
from seppo_fast.methods.losses.mapo import mapo
from seppo_fast.methods.losses.nft import nft, nft_targets
from seppo_fast.methods.losses.policy_gradient import ddpo, grpo
from seppo_fast.methods.losses.rows import mean_absolute_errors, weighted_error_gradient
from seppo_fast.methods.losses.rpo import rpo, rpo_weights
from seppo_fast.methods.losses.step_preference import preference_steps

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(values):
    return torch.as_tensor(values, dtype=torch.float64).clone().requires_grad_()


def exactly_clipped(base):
    """Returns (log ratio, c, c of the textbook) near `base`: the ratio is 1 + c bit for bit.

    The textbook rounds the ratio, so that its c is another number, by less than 1e-15.
    """
    for x in (base * (1 + step * 1e-3) for step in range(1000)):
        exact = torch.tensor(x, dtype=torch.float64).expm1().item()
        if math.log1p(exact) == x:
            return x, exact, torch.tensor(x, dtype=torch.float64).exp().item() - 1
    raise AssertionError("no such number")


def check(rows, textbook, leaves):
    """Compares the mean loss and the slopes with autograd's, leaf by leaf in the order of the coefficients."""
    torch.testing.assert_close(rows.loss.mean(), textbook, **EXACT)
    torch.testing.assert_close(rows.sums["loss"], rows.loss.sum(), **EXACT)
    gradients = torch.autograd.grad(textbook, leaves)
    torch.testing.assert_close(rows.coefficients.flatten(), torch.cat([g.flatten() for g in gradients]), **EXACT)
    return gradients


def textbook_ddpo(error, old, kappa, advantage, clip):
    ratio = torch.exp(-kappa * error - -kappa * old)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()


@pytest.mark.parametrize("base", [1e-4, 0.1])
def test_ddpo_on_both_sides_of_each_clip_and_at_it(base):
    at, clip, rounded = exactly_clipped(base)
    below = math.log1p(-clip)
    log_ratio = torch.tensor([0.0, at, 0.5 * at, 2 * at, 0.5 * below, 2 * below, 1e-3 * at], dtype=torch.float64)
    advantage = torch.tensor([1.5, -2.0, 0.0], dtype=torch.float64).repeat_interleave(len(log_ratio))
    log_ratio = log_ratio.repeat(3)
    # With kappa 1 and an old error of 0 the log-ratio is exactly -error; the others are away from the clips.
    for kappa, old in ((1.0, 0.0), (27.2, 0.4)):
        keep = torch.ones_like(log_ratio, dtype=torch.bool) if old == 0 else log_ratio != at
        kappas = torch.full_like(log_ratio[keep], kappa)
        olds = torch.full_like(kappas, old)
        error, gain = leaf(olds - log_ratio[keep] / kappas), advantage[keep]
        rows = ddpo(error.detach(), olds, kappas, gain, clip=clip)
        (gradient,) = check(rows, textbook_ddpo(error, olds, kappas, gain, rounded), [error])
        silent = gradient == 0
        assert torch.equal(
            silent, (gain == 0) | ((gain > 0) & (log_ratio[keep] > at)) | ((gain < 0) & (log_ratio[keep] < below))
        )
        assert rows.sums["clipped"] == ((log_ratio[keep] > at) | (log_ratio[keep] < below)).sum()
        torch.testing.assert_close(rows.sums["log_ratio_square"], log_ratio[keep].square().sum(), rtol=1e-8, atol=1e-20)


PASSES = {
    "ddpo": (lambda *numbers: ddpo(*numbers, clip=0.1), [(2,)] * 4),
    "grpo": (lambda *numbers: grpo(*numbers, clip=0.1, kl=0.1), [(2,)] * 5),
    "preference_steps": (
        lambda error, ref, kappa: preference_steps(error, ref, kappa, torch.ones(2), beta=0.1, clamp=0.1),
        [(2, 2), (2, 2), (2,)],
    ),
    "kto": (lambda error, ref: kto(error, ref, torch.tensor([True, False]), torch.tensor(0.1), beta=9.0), [(2,)] * 2),
    "mapo": (lambda *errors: mapo(*errors, beta=0.1, q=0.5, steps=1000), [(2,)] * 2),
    "nft": (lambda *numbers: nft(*numbers, mix=0.5), [(2,)] * 5),
    "rpo": (lambda *numbers: rpo(*numbers, beta=9.0), [(2,)] * 4 + [(2, 2)]),
}


@pytest.mark.parametrize("name", PASSES)
def test_nan_passes_on_to_the_loss_and_the_gradient(name):
    """Whichever number is NaN, the loss is NaN, and a coefficient or the residual of that number's target is too."""
    call, shapes = PASSES[name]
    residuals = {"nft": (0, 1), "grpo": (2,)}.get(name, ())  # the slope does not depend on these errors
    for place in range(len(shapes)):
        numbers = [drawn(*shape, seed=seed).abs() for seed, shape in enumerate(shapes)]
        assert call(*numbers).loss.isfinite().all()
        numbers[place].flatten()[0] = math.nan
        rows = call(*numbers)
        assert rows.loss[0].isnan() and rows.sums["loss"].isnan()
        assert place in residuals or rows.coefficients.isnan().any(), (name, place)


def test_nan_stays_in_its_row_and_is_not_clipped():
    rows = ddpo(drawn(2), drawn(2, seed=1), torch.ones(2), torch.tensor([math.nan, 1.0]), clip=0.1)
    assert rows.loss.isnan().tolist() == rows.coefficients[0].isnan().tolist() == [True, False]
    error, zero = torch.tensor([[math.nan, 0.01], [5.0, 0.02]]), torch.zeros(2, 2)
    rows = preference_steps(error, zero, torch.ones(2), torch.ones(2), beta=0.1, clamp=0.1)
    assert rows.loss.isnan().tolist() == rows.coefficients[0].isnan().tolist() == [True, False]
    assert rows.sums["clipped"] == 1  # the second step of the first row
    gradient = weighted_error_gradient(torch.ones(2, 3), [torch.zeros(2, 3)], rows.coefficients[:1])
    assert gradient.isnan().all(1).tolist() == [True, False]


def test_float64_advantages_do_not_widen_a_float32_loss():
    numbers = drawn(3).float().abs()
    rows = ddpo(numbers, numbers, drawn(3), drawn(3), clip=1e-4)
    assert rows.loss.dtype == rows.coefficients.dtype == rows.sums["clipped"].dtype == torch.float32


def test_grpo_adds_the_divergence_of_the_step():
    prediction, target, reference, old = drawn(4, 5, 3, 2)
    kappa, advantage, kl, clip = drawn(5, seed=2).abs(), drawn(5, seed=3), 0.04, 0.05
    prediction.requires_grad_()
    error, gap = denoising_errors_of(prediction, target), denoising_errors_of(prediction, reference)
    rows = grpo(
        error.detach(), denoising_errors_of(old, target), gap.detach(), kappa, advantage, clip=clip, kl=kl
    )  # fmt: skip
    # KL(N(mu, s^2), N(mu_ref, s^2)), averaged over the latent, with mu = a x + b p and kappa = b^2 / (2 s^2).
    b, sigma = (2 * kappa).sqrt()[:, None, None], torch.ones(5, 3, 2, dtype=torch.float64)
    means = torch.distributions.Normal(b * prediction, sigma), torch.distributions.Normal(b * reference, sigma)
    divergence = torch.distributions.kl_divergence(*means).flatten(1).mean(1)
    policy = textbook_ddpo(error, denoising_errors_of(old, target), kappa, advantage, clip)
    expected = policy + kl * divergence.mean()
    torch.testing.assert_close(rows.loss.mean(), expected, **EXACT)
    torch.testing.assert_close(rows.sums["kl"], kl * divergence.sum(), **EXACT)
    (gradient,) = torch.autograd.grad(expected, prediction)
    got = weighted_error_gradient(prediction.detach(), [target, reference], rows.coefficients)
    torch.testing.assert_close(got, gradient, **EXACT)


def denoising_errors_of(prediction, target):
    """Returns mean squared errors in float64, which the kernels do not."""
    return (prediction - target).square().flatten(1).mean(1)


@pytest.mark.parametrize(("beta", "base"), [(0.1, 0.0953), (10.0, 0.0953)])
def test_preference_of_steps_at_and_beside_the_clamp(beta, base):
    at, clamp, rounded = exactly_clipped(base)
    low = math.log1p(-clamp)
    values = [0.0, at, 0.5 * at, 1.5 * at, 0.5 * low, 1.5 * low]
    pairs = torch.tensor([[x, y, s] for x in values for y in values for s in (1.0, -1.0, 0.0)], dtype=torch.float64)
    error, sign = leaf(-pairs[:, :2].T), pairs[:, 2]
    reference, kappa = torch.zeros_like(error), torch.ones(len(pairs), dtype=torch.float64)
    rows = preference_steps(error.detach(), reference, kappa, sign, beta=beta, clamp=clamp)
    ratio = torch.exp(-error - -reference).clamp(1 - rounded, 1 + rounded)
    logit = beta * (sign * ratio[0].log() - sign * ratio[1].log())
    (gradient,) = check(rows, -F.logsigmoid(logit).mean(), [error])
    assert gradient[:, sign == 0].eq(0).all() and rows.loss[sign == 0].eq(math.log(2)).all()
    outside = ((pairs[:, :2] > at) | (pairs[:, :2] < low)).T
    assert gradient[outside].eq(0).all() and gradient[:, sign != 0][~outside[:, sign != 0]].ne(0).all()
    assert rows.sums["clipped"] == outside.any(0).sum() and rows.sums["correct"] == (logit > 0).sum()


def test_preference_of_steps_with_two_times_and_its_range():
    """Different kappas per half; at D3PO's settings the loss stays in [0.683, 0.703]."""
    error, reference, kappa = leaf(drawn(2, 40).abs()), drawn(2, 40, seed=1).abs(), drawn(2, 40, seed=2).abs()
    sign = torch.ones(40, dtype=torch.float64)
    rows = preference_steps(error.detach(), reference, kappa, sign, beta=0.1, clamp=0.1)
    ratio = torch.exp(-kappa * (error - reference)).clamp(0.9, 1.1).log()
    check(rows, F.softplus(-0.1 * (ratio[0] - ratio[1])).mean(), [error])
    assert 0.6831 < rows.loss.min() < 0.684 and 0.7031 < rows.loss.max() < 0.7033


def test_preference_of_steps_with_one_prediction():
    """SPO: one prediction, two targets; D_w - D_l is linear in it, -2 mean (p - q)(T_w - T_l)."""
    prediction, reference, winner, loser = drawn(4, 6, 3, 4)
    errors = torch.stack([denoising_errors_of(prediction, t) for t in (winner, loser)])
    references = torch.stack([denoising_errors_of(reference, t) for t in (winner, loser)])
    kappa = torch.full((6,), 0.4, dtype=torch.float64)
    rows = preference_steps(errors, references, kappa, torch.ones(6), beta=10.0, clamp=0.9)
    margin = -2 * ((prediction - reference) * (winner - loser)).flatten(1).mean(1)
    inside = ((-0.4 * (errors - references)).exp() - 1).abs().lt(0.9).all(0)
    assert 2 <= inside.sum() < 6
    torch.testing.assert_close(rows.loss[inside], F.softplus(10 * 0.4 * margin)[inside], **EXACT)


@pytest.mark.parametrize("mix", [1.0, 0.1])
def test_nft_against_its_own_form(mix):
    prediction, target, old = drawn(3, 7, 2, 5)
    prediction.requires_grad_()
    optimality = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0, 0.5, 0.3], dtype=torch.float64)

    def half(v):
        return (v - target).square().flatten(1).mean(1) / (v - target).detach().abs().flatten(1).mean(1).clamp(min=1e-5)

    plus, minus = (1 - mix) * old + mix * prediction, (1 + mix) * old - mix * prediction
    textbook = 5 * ((optimality * half(plus) + (1 - optimality) * half(minus)) / mix).mean()
    targets = nft_targets(target, old, mix=mix)
    plain = prediction.detach()
    rows = nft(
        *(denoising_errors_of(plain, t) for t in targets), *(mean_absolute_errors(plain, t) for t in targets),
        optimality, mix=mix,
    )  # fmt: skip
    torch.testing.assert_close(rows.loss.mean(), textbook, **EXACT)
    torch.testing.assert_close(rows.sums["positive_loss"] + rows.sums["negative_loss"], rows.sums["loss"], **EXACT)
    (gradient,) = torch.autograd.grad(textbook, prediction)
    torch.testing.assert_close(weighted_error_gradient(plain, targets, rows.coefficients), gradient, **EXACT)


def test_nft_divides_by_no_less_than_its_floor():
    zero, one = torch.zeros(1), torch.ones(1)
    rows = nft(zero, one, zero, one, one, mix=0.1)
    assert rows.loss.item() == 0.0 and rows.coefficients[0].item() == pytest.approx(5 * 0.1 / 1e-5)


def test_mapo_by_autograd_and_its_published_numbers():
    winner, loser = leaf([0.3, 0.01, 1.0, 0.21, 4e-3]), leaf([0.299, 0.02, 0.2, 0.2100001, 3.9e-3])
    rows = mapo(winner.detach(), loser.detach(), beta=0.1, q=0.5, steps=1000)
    ratios = [0.5 * m / (torch.exp(0.5 * m) - 1) for m in (winner, loser)]
    logit = 1000 * (ratios[0] - ratios[1])
    check(rows, (winner - 0.1 * F.logsigmoid(logit)).mean(), [winner, loser])
    assert rows.sums["saturated"] == (logit.abs() > 10).sum() == 1 and rows.sums["correct"] == (logit > 0).sum()
    at_zero = mapo(torch.zeros(1), torch.zeros(1), beta=0.1, q=0.5, steps=1000)
    assert at_zero.coefficients.flatten().tolist() == pytest.approx([13.5, -12.5], rel=1e-7)
    assert at_zero.loss.item() == pytest.approx(0.1 * math.log(2), rel=1e-6)


def test_mapo_is_smooth_where_its_series_begins():
    """f and f' against Taylor series with exact coefficients, on both sides of 1e-3 and far below float32's reach."""
    for x in (1e-12, 1e-6, 9.99e-4, 1.001e-3, 1e-2):
        rows = mapo(
            torch.tensor([x], dtype=torch.float64), torch.zeros(1, dtype=torch.float64), beta=1.0, q=1.0, steps=1.0
        )
        f = 1 - x / 2 + x**2 / 12 - x**4 / 720 + x**6 / 30240
        slope = -1 / 2 + x / 6 - x**3 / 180 + x**5 / 5040
        z = f - 1
        assert rows.sums["ratio_margin"].item() == pytest.approx(z, rel=1e-10, abs=2e-16)
        expected = 1 - slope / (1 + math.exp(z))
        assert rows.coefficients[0, 0].item() == pytest.approx(expected, rel=1e-12)
    far = mapo(torch.tensor([1e4]), torch.tensor([0.1]), beta=0.1, q=0.5, steps=1000)
    assert far.loss.isfinite().all() and far.coefficients.isfinite().all()


def test_rpo_by_autograd():
    winner, loser = leaf(drawn(4).abs()), leaf(drawn(4, seed=1).abs())
    ref_winner, ref_loser = drawn(4, seed=2).abs(), drawn(4, seed=3).abs()
    weights = rpo_weights(drawn(4, 6, seed=4), drawn(4, 6, seed=5), temperature=0.5)
    rows = rpo(winner.detach(), loser.detach(), ref_winner, ref_loser, weights, beta=7.0)
    terms = [
        -F.logsigmoid(-3.5 * weights[i, j] * ((winner[i] - ref_winner[i]) - (loser[j] - ref_loser[j])))
        for i in range(4) for j in range(4)
    ]  # fmt: skip
    check(rows, torch.stack(terms).mean(), [winner, loser])


def test_rpo_of_one_pair_is_diffusion_dpo():
    prediction, target, reference = drawn(3, 2, 3, 4)
    prediction.requires_grad_()
    dpo = preference_loss(prediction, target, reference, beta=2.0, flipper="never", backend="torch")
    (expected,) = torch.autograd.grad(dpo.loss, prediction)
    errors = [denoising_errors_of(p, target).detach().chunk(2) for p in (prediction, reference)]
    weights = rpo_weights(drawn(1, 5), drawn(1, 5, seed=1), temperature=0.01)
    rows = rpo(errors[0][0], errors[0][1], errors[1][0], errors[1][1], weights, beta=2.0)
    assert rows.loss.item() == pytest.approx(dpo.loss.item(), rel=1e-6)
    got = weighted_error_gradient(prediction.detach(), [target], rows.coefficients)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


def test_rpo_with_equal_and_with_distinct_embeddings():
    winner, loser, zero = drawn(3).abs(), drawn(3, seed=1).abs(), torch.zeros(3, dtype=torch.float64)
    same = rpo_weights(torch.ones(3, 4), torch.ones(3, 4), temperature=0.01)
    torch.testing.assert_close(same, torch.full((3, 3), 1 / 3))
    distinct = rpo_weights(torch.eye(3), torch.eye(3), temperature=1e-3)
    assert torch.equal(distinct, torch.eye(3))
    rows = rpo(winner, loser, zero, zero, distinct, beta=20.0)
    pair = F.softplus(10.0 * (winner - loser))
    torch.testing.assert_close(rows.loss, (pair + 2 * math.log(2)) / 3, **EXACT)
    dpo = 10.0 * torch.sigmoid(10.0 * (winner - loser)) / 3
    torch.testing.assert_close(rows.coefficients[0, :3], dpo / 3, **EXACT)  # B = 3 times weaker than DPO's


def test_kto_by_autograd_with_its_offset():
    error, reference = leaf([0.3, 0.4, 0.2, 0.9, 0.5]), torch.tensor([0.31, 0.38, 0.25, 0.7, 0.5], dtype=torch.float64)
    liked = torch.tensor([True, True, False, False, True])
    offset = torch.tensor(0.004, dtype=torch.float64)
    rows = kto(error.detach(), reference, liked, offset, beta=30.0, weights=(1.0, 1.5))
    terms = []
    for m, r, good in zip(error, reference, liked, strict=True):
        gain = 30.0 * (r - m - offset)
        terms.append(1 - torch.sigmoid(gain) if good else 1.5 * (1 - torch.sigmoid(-gain)))
    check(rows, torch.stack(terms).mean(), [error])
    assert rows.sums["liked"] == 3 and rows.sums["correct"] == 2


def test_kto_offset_is_that_of_all_ranks_and_never_negative():
    first, second = torch.tensor([0.2, -0.1]), torch.tensor([0.4, 0.1, 0.0])  # r - m on two ranks
    together = kto_offset(first.sum() + second.sum(), 5)
    assert together.item() == pytest.approx(0.6 / 5)
    assert kto_offset(-first.sum(), 2).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights(dtype):
    """The ratio is exactly 1: DDPO's loss is -mean A, the preferences' ln 2, and NFT's gradient cancels."""
    prediction, target = drawn(2, 6, 3, 5).to(dtype)
    error = denoising_errors(prediction.flatten(1), target.flatten(1))
    kappa, advantage = drawn(6, seed=1).abs() * 30, drawn(6, seed=2).float()
    rows = ddpo(error, error.clone(), kappa, advantage, clip=1e-4)
    assert torch.equal(rows.loss, -advantage) and rows.sums["log_ratio_square"] == 0 == rows.sums["clipped"]
    torch.testing.assert_close(rows.coefficients[0], advantage * kappa.float() / 6, rtol=1e-6, atol=0)
    both = torch.stack([error, error])
    assert preference_steps(both, both.clone(), kappa, torch.ones(6), beta=10.0, clamp=0.1).loss.eq(math.log(2)).all()
    targets = nft_targets(target.float(), prediction.float(), mix=1.0)
    numbers = [denoising_errors(prediction.flatten(1), t.flatten(1)) for t in targets]
    numbers += [mean_absolute_errors(prediction, t) for t in targets]
    half = nft(*numbers, torch.full((6,), 0.5), mix=1.0)
    gradient = weighted_error_gradient(prediction, targets, half.coefficients)
    alone = weighted_error_gradient(prediction, targets[:1], half.coefficients[:1])
    assert gradient.abs().max() < 1e-6 * alone.abs().max()
