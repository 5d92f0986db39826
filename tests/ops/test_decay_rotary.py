"""Decay schedules, row norm and phases against closed forms; the phases against 50 decimal digits."""

import math
from decimal import Decimal, getcontext

import pytest
import torch

from retentive.ops import decay, rotary

TWO_PI = 2 * Decimal("3.14159265358979323846264338327950288419716939937510")

TURNING = [variant for variant in rotary.VARIANTS if variant != "none"]


@pytest.fixture
def digits():
    """Decimal arithmetic with 50 digits; restores the previous context."""
    before, getcontext().prec = getcontext().prec, 50
    yield
    getcontext().prec = before


def test_paper_schedule_is_equation_8():
    got = decay.log_decay("paper", 8, dtype=torch.float64)
    # exp and the subtraction round once each in float64
    torch.testing.assert_close(got.exp(), 1 - 2.0 ** (-5 - torch.arange(8).double()), rtol=1e-15, atol=0)


@pytest.mark.parametrize("H", [1, 4, 32])
def test_lm_schedule_spans_horizons_of_32_to_512_tokens(H):
    gamma = decay.log_decay("lm", H, dtype=torch.float64).exp()
    want = 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), H, dtype=torch.float64).exp()
    torch.testing.assert_close(gamma, want, rtol=1e-14, atol=0)  # a few float64 roundings
    horizon = 1 / (1 - gamma)
    # 1 - gamma is at least 2^-9, which leaves 44 of 53 bits, 1e-13
    assert horizon[0].item() == pytest.approx(32, rel=1e-12)
    assert H == 1 or horizon[-1].item() == pytest.approx(512, rel=1e-12)


def test_none_never_forgets_and_numbers_are_taken_as_they_are():
    assert decay.values("none", 3) == [0.0] * 3
    assert decay.values((-0.5, -1, 0), 3) == [-0.5, -1.0, 0.0]


def test_all_32_heads_of_the_paper_schedule_stay_apart_in_float32():
    """In float32 1 - 2^-36 is 1, while log1p(-2^-36) is not 0."""
    got = decay.log_decay("paper", 32)
    assert got.dtype == torch.float32 and len(set(got.tolist())) == 32 and got.max() < 0
    want = [math.log1p(-(2.0 ** (-5 - h))) for h in range(32)]
    want = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=2**-24, atol=0)  # one rounding to float32


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("slow", "unknown decay schedule 'slow'"),
        ((-0.1,), "decay needs 2 log decays"),
        ((-0.1, 0.1), "log decays <= 0"),
        ((-0.1, math.nan), "log decays <= 0"),
    ],
    ids=["name", "count", "positive", "nan"],
)
def test_bad_schedules(schedule, words, refuses):
    with refuses(words):
        decay.log_decay(schedule, 2)


# float64: expm1 / expm1 and the sum of 3000 terms round a few times. float32: count * log_decay is rounded too, which
# shifts log(gamma^n) by 2^-24 of itself, and rsqrt halves the effect.
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 4e-7)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("schedule", ["paper", "lm", "none"])
def test_row_norm_is_the_root_of_the_explicit_sum(schedule, dtype, tol):
    H, n = 32, [1, 2, 3, 17, 512, 3000]
    gamma = decay.log_decay(schedule, H, dtype=torch.float64).exp()
    sums = torch.stack([sum(gamma**j for j in range(count)) for count in n])
    got = decay.row_norm(decay.log_decay(schedule, H, dtype=dtype), torch.tensor(n))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), sums.rsqrt(), rtol=tol, atol=0)


def test_row_norm_has_the_shape_of_the_counts_and_takes_0_for_1():
    log_decay = decay.log_decay("lm", 2)
    got = decay.row_norm(log_decay, torch.tensor([[0, 1, 2], [5, 6, 7]]))
    assert got.shape == (2, 3, 2)
    assert got[0, 0].tolist() == got[0, 1].tolist() == [1.0, 1.0]


def power(variant: str, i: int, K: int) -> Decimal:
    """Returns minus the exponent of 10000: torchscale's linspace(0, 1, K/2), fla's 2i/K."""
    return Decimal(i) / max(K // 2 - 1, 1) if variant == "interleaved" else Decimal(2 * i) / K


@pytest.mark.parametrize("position", [0, 1, 1000, 10**6 + 3, 999_999_937])  # the last is not exact in float32
@pytest.mark.parametrize("K", [2, 8, 64])
@pytest.mark.parametrize("variant", TURNING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_phases_against_50_digits(variant, K, position, dtype, digits):
    cos, sin = rotary.phases(torch.tensor([position]), K, variant, dtype=dtype)
    assert cos.shape == sin.shape == (1, K // 2) and cos.dtype == sin.dtype == dtype
    # angle and angle * position are float64, each off by 2^-53 of itself; then one rounding of the result
    tol = 4 * 2.0**-53 * position + (2.0**-24 if dtype == torch.float32 else 2.0**-52)
    for i in range(K // 2):
        phase = float(position * Decimal(10000) ** -power(variant, i, K) % TWO_PI)
        assert cos[0, i].item() == pytest.approx(math.cos(phase), rel=0, abs=tol)
        assert sin[0, i].item() == pytest.approx(math.sin(phase), rel=0, abs=tol)


def test_rotation_is_multiplication_by_a_unit_complex_number():
    x, position = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.arange(5)
    for variant in TURNING:
        cos, sin = rotary.phases(position, 8, variant, dtype=torch.float64)
        turn = torch.complex(cos, sin)[:, None]
        if variant == "interleaved":
            want = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
        else:
            z = torch.complex(x[..., :4], x[..., 4:]) * turn
            want = torch.cat((z.real, z.imag), -1)
        # the same products and sums, possibly fused: the last bit of values up to about 4
        torch.testing.assert_close(rotary.rotate(x, cos, sin, variant), want, rtol=0, atol=2e-15)


def test_without_rotation_nothing_turns():
    x, position = torch.randn(2, 5, 3, 8).bfloat16(), torch.tensor([0, 1, 7, 10**6, 999_999_937])
    cos, sin = rotary.phases(position, 8, "none")
    assert cos.shape == sin.shape == (5, 4) and bool((cos == 1).all()) and not sin.any()
    assert torch.equal(rotary.rotate(x, cos, sin, "none"), x.float())


@pytest.mark.parametrize("variant", TURNING)
def test_scores_depend_on_the_distance_alone(variant):
    """The purpose of rotation: <R_n q, R_m k> is a function of n - m, wherever rows start."""
    q, k = torch.randn(2, 1, 6, 2, 16, dtype=torch.float64)

    def scores(start):
        cos, sin = rotary.phases(torch.tensor([start]).unsqueeze(1) + torch.arange(6), 16, variant, dtype=torch.float64)
        return torch.einsum("bnhk,bmhk->bhnm", *(rotary.rotate(x, cos, sin, variant) for x in (q, k)))

    unrotated = torch.einsum("bnhk,bmhk->bhnm", q, k)
    assert (scores(0) - unrotated).norm() > 0.1 * unrotated.norm()  # it does depend on the distance
    for start in (17, 10**6):
        # phases at position 10^6 are off by 10^6 * 2^-53, 1e-10
        torch.testing.assert_close(scores(start), scores(0), rtol=0, atol=1e-8)


def test_bad_rotations(refuses):
    with refuses("must be even, got 7"):
        rotary.phases(torch.arange(3), 7, "half")
    with refuses("unknown rotary variant 'quarter'"):
        rotary.phases(torch.arange(3), 8, "quarter")
