"""The retention layer against equation 8 written out in float64, and against itself one token at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from retentive.layers import MultiScaleRetention, positions_of
from retentive.layers.config import RetentionConfig
from retentive.ops import decay, using

D, H, K, V, EPS = 24, 4, 6, 10, 1e-6
# float64 has 53 bits, 1e-16; a layer is some hundred products and sums in a row
EXACT = 1e-12

PLAIN = dict(
    dim=D,
    heads=H,
    kv_heads=H,
    key_dim=H * K,
    value_dim=H * V,
    decay="lm",
    rotary="interleaved",
    score_norm=True,
    head_norm=True,
    head_norm_affine=False,
    gate=True,
    qk_norm=False,
    norm_eps=EPS,
)
VARIANTS = {
    "default": {},
    "paper-decay": dict(decay="paper"),
    "no-decay": dict(decay="none"),
    "own-decays": dict(decay=(-0.5, -0.1, -0.01, 0.0)),
    "no-score-norm": dict(score_norm=False),
    "half-affine": dict(rotary="half", head_norm_affine=True),
    "no-gate": dict(gate=False),
    "no-head-norm": dict(head_norm=False),
    "kv-heads-2": dict(kv_heads=2),
    "kv-heads-1": dict(kv_heads=1),
    "gated-decay": dict(decay="gated", score_norm=False),
    "gated-decay-kv-heads": dict(decay="gated", score_norm=False, kv_heads=2),
    "gated-decay-scale-bias": dict(decay="gated", score_norm=False, decay_scale=3.0, decay_bias=True),
    "sigmoid-decay": dict(decay="sigmoid", score_norm=False, decay_bias=True, kv_heads=2),
    "decay-range": dict(decay_range=(1 / 4, 1 / 64)),
    "no-rotation": dict(rotary="none"),
    "qk-norm": dict(qk_norm=True, kv_heads=2),
    "qk-bias": dict(qk_bias=True, kv_heads=2),
    "qk-norm-bias": dict(qk_norm=True, qk_bias=True, rotary="half"),
    "sigmoid-gate": dict(gate_activation="sigmoid"),
    "joint-head-norm": dict(head_norm_joint=True, head_norm_affine=True, kv_heads=2),
    "all-new": dict(
        decay="gated", score_norm=False, decay_bias=True, qk_norm=True, qk_bias=True, head_norm=False, rotary="none"
    ),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str = "default", *, dtype=torch.float64, **changes) -> MultiScaleRetention:
    """A layer whose every weight matters: matrices N(0, 1/width), gains around 1."""
    layer = MultiScaleRetention(RetentionConfig(**{**PLAIN, **VARIANTS[variant], **changes}))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return layer.to(dtype)


def run(layer, x, state=None, *, start=None, lengths=None, **how):
    positions = positions_of(x.shape[0], x.shape[1], start, lengths, None, x.device)
    with using(**how):
        return layer(x, state, positions, layer.phases(positions, x.dtype))


def formula(layer: MultiScaleRetention, x: torch.Tensor, variant: str) -> torch.Tensor:
    """(swish(x Wg) * norm((Q K^T / sqrt(K) * D) V)) Wo, for all pairs of tokens at once."""
    c = vars(RetentionConfig(**{**PLAIN, **VARIANTS[variant]}))
    T = x.shape[1]
    half = c["rotary"] == "half"
    powers = [i / (K // 2) if half else i / (K // 2 - 1) for i in range(K // 2)]
    angle = torch.tensor([[[t * 10000.0**-p for p in powers]] for t in range(T)], dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle * (c["rotary"] != "none"))

    def turned(y):
        """The product of the tokens' complex numbers with e^(i angle position), as real and imaginary parts."""
        pairs = y.unflatten(-1, (2, -1)).mT if half else y.unflatten(-1, (-1, 2))
        return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)

    def project(proj, heads, norm=None, bias=None):
        y = (x @ proj.weight.T).unflatten(-1, (heads, -1))
        if norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight
        y = y if bias is None else y + bias.unflatten(-1, (heads, -1))
        return torch.stack([y[:, :, h * heads // H] for h in range(H)], 2)

    q = turned(project(layer.q_proj, H, layer.q_norm, layer.q_bias))
    k = turned(project(layer.k_proj, c["kv_heads"], layer.k_norm, layer.k_bias))
    if c["decay"] == "gated":
        bias = layer.decay_proj.bias if c["decay_bias"] else 0
        kept = torch.sigmoid(x @ layer.decay_proj.weight.T + bias)
        since = (torch.log(kept) / c["decay_scale"]).cumsum(1).transpose(1, 2)
        mask = (since[..., :, None] - since[..., None, :]).exp().tril()
    elif c["decay"] == "sigmoid":
        rate = math.exp(-0.5) / (1 + torch.exp(-(x @ layer.decay_proj.weight.T + layer.decay_proj.bias)))
        since = -rate.cumsum(1).transpose(1, 2)
        mask = (since[..., :, None] - since[..., None, :]).exp().tril()
    else:
        gamma = torch.tensor([math.exp(g) for g in decay.values(c["decay"], H, c["decay_range"])], dtype=torch.float64)
        lag = torch.arange(T)[:, None] - torch.arange(T)
        mask = (gamma[:, None, None] ** lag.clamp(min=0)).tril()
    if c["score_norm"]:
        mask = mask / mask.sum(-1, keepdim=True).sqrt()
    scores = torch.einsum("bnhpi,bmhpi->bhnm", q, k) / math.sqrt(K) * mask
    o = torch.einsum("bhnm,bmhv->bnhv", scores, project(layer.v_proj, c["kv_heads"]))
    if c["head_norm"]:
        over = (-2, -1) if c["head_norm_joint"] else -1
        o = o / (o.square().mean(over, keepdim=True) + EPS).sqrt()
    o = (o * layer.head_norm.weight.view(-1, o.shape[-1]) if c["head_norm_affine"] else o).flatten(-2)
    if c["gate"]:
        g = x @ layer.g_proj.weight.T
        o = (F.silu(g) if c["gate_activation"] == "swish" else torch.sigmoid(g)) * o
    return o @ layer.out_proj.weight.T


@variants
def test_is_the_papers_formula(variant, same):
    layer, x = make(variant), torch.randn(2, 19, D, dtype=torch.float64)
    want = formula(layer, x, variant)
    for form in ("auto", "parallel", "recurrent", "chunkwise"):
        same(run(layer, x, form=form, chunk_size=5)[0], want, EXACT, form)


@variants
def test_a_chunk_is_its_tokens_one_by_one(variant, same):
    layer, x = make(variant), torch.randn(2, 19, D, dtype=torch.float64)
    want, end = run(layer, x)
    for form in ("auto", "recurrent", "chunkwise"):  # auto takes single steps
        state, out = None, []
        for t in range(19):
            y, state = run(layer, x[:, t : t + 1], state, start=torch.full((2,), t), form=form)
            out.append(y)
        same((torch.cat(out, 1), state), (want, end), EXACT, form)


@pytest.mark.parametrize("form", ["auto", "parallel", "recurrent", "chunkwise"])
@pytest.mark.parametrize("variant", ["default", "half-affine", "gated-decay", "kv-heads-2", "all-new"])
def test_padding_neither_writes_nor_decays_nor_counts(variant, form, same):
    layer, x = make(variant), torch.randn(4, 9, D, dtype=torch.float64)
    spans = [(0, 9), (0, 4), (5, 9), (2, 3)]  # none, right, left, both sides
    out, states = run(layer, x, lengths=torch.tensor(spans), form=form, chunk_size=4)
    for row, (a, b) in enumerate(spans):
        want, state = run(layer, x[row : row + 1, a:b])
        same((out[row : row + 1, a:b], states[row : row + 1]), (want, state), EXACT, f"row {row}")
    assert out.isfinite().all()


@variants
def test_all_forms_have_the_same_gradients(variant, same):
    """Gradients of the input, of the state before and of every weight, through the formula and through each form."""
    layer, x = make(variant), torch.randn(2, 19, D, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    toward = torch.randn(2, 19, D, dtype=torch.float64)
    want = torch.autograd.grad(formula(layer, x, variant), inputs, toward)
    for form in ("parallel", "recurrent", "chunkwise"):
        out, _ = run(layer, x, form=form, chunk_size=5)
        same(list(torch.autograd.grad(out, inputs, toward)), list(want), EXACT, form)


@variants
def test_packed_sequences_are_the_sequences(variant, same):
    layer, x = make(variant), torch.randn(1, 19, D, dtype=torch.float64)
    cu = torch.tensor([0, 7, 8, 19])
    positions = positions_of(1, 19, None, None, cu, x.device)
    out, states = layer(x, None, positions, layer.phases(positions, x.dtype))
    for n, (a, b) in enumerate([(0, 7), (7, 8), (8, 19)]):
        want, state = run(layer, x[:, a:b])
        same((out[:, a:b], states[n : n + 1]), (want, state), EXACT, f"sequence {n}")


@pytest.mark.parametrize("kind", ["gated", "sigmoid"])
def test_a_fresh_decay_bias_has_the_decays_of_its_range(kind):
    layer = MultiScaleRetention(
        RetentionConfig(dim=D, heads=H, decay=kind, score_norm=False, decay_bias=True, decay_range=(1 / 4, 1 / 99))
    )
    layer.reset_parameters()
    bias = layer.decay_proj.bias
    fresh = F.logsigmoid(bias) / 16 if kind == "gated" else -math.exp(-0.5) / (1 + torch.exp(-bias))
    want = torch.tensor(decay.values("lm", H, (1 / 4, 1 / 99)))
    torch.testing.assert_close(fresh, want, rtol=1e-5, atol=0)  # float32 parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(score_norm=True), "score_norm"),
        (dict(decay="sigmoid", score_norm=True), "score_norm"),
        (dict(decay="sigmoid", score_norm=False, decay_range=(0.5, 0.1)), "decay_range"),
        (dict(decay="lm", decay_bias=True), "decay='gated'"),
        (dict(decay_range=(0.5, float("nan"))), "decay_range"),
        (dict(decay_range=(0.5,)), "decay_range"),
        (dict(decay_range=7), "decay_range"),
        (dict(decay_scale=0.0), "decay_scale"),
        (dict(decay_scale=float("nan")), "decay_scale"),
        (dict(decay=(-0.1, float("nan"), -0.1, -0.1)), "log decays <= 0"),
        (dict(rotary="full"), "rotary"),
        (dict(gate_activation="relu"), "gate_activation"),
        (dict(qk_norm=1), "true or false"),
        (dict(norm_eps=float("nan")), "norm_eps"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RetentionConfig(dim=D, heads=H, **changes)


def test_a_row_of_padding_alone_leaves_its_state_as_it_was(same):
    layer, x = make(), torch.randn(2, 3, D, dtype=torch.float64)
    state = torch.randn(2, H, K, V, dtype=torch.float64)
    out, after = run(layer, x, state.clone(), start=torch.tensor([7, 7]), lengths=torch.tensor([3, 0]))
    same(after[1], state[1], 0)
    assert out.isfinite().all()


NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
WIDE = dict(heads=32, kv_heads=32, key_dim=128, value_dim=128)  # 32 heads: the paper's slowest has gamma 1 - 2^-36


@NARROW
@pytest.mark.parametrize("schedule", ["paper", "lm"])
def test_a_cast_changes_no_decay_no_phase_and_no_state(schedule, dtype, same):
    T = 8192
    layer = make(dtype=torch.float32, decay=schedule, **WIDE)
    positions = positions_of(1, T, None, None, None, torch.device("cpu"))
    before = layer.phases(positions, torch.float32)
    layer.to(dtype)
    after = layer.phases(positions, dtype)
    same(list(after), list(before), 0)
    assert after.log_decay.dtype == after.cos.dtype == after.q_scale.dtype == torch.float32
    assert len(set(after.log_decay.tolist())) == 32 and after.log_decay.max() < 0
    out, state = run(layer, torch.randn(1, T, D, dtype=dtype))
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    assert out.isfinite().all() and state.isfinite().all()


@NARROW
def test_below_float32_it_is_as_close_to_the_truth_as_plain_torch(dtype, gold_rule, plain_retention, monkeypatch):
    """The same layer in float64 is the truth; with plain torch in place of the operator, the measure."""
    layer, x = make(dtype=dtype, decay="paper", **WIDE), torch.randn(2, 300, D).to(dtype)
    test, _ = run(layer, x)
    stepped, state = [], None
    for t in range(300):
        y, state = run(layer, x[:, t : t + 1], state, start=torch.full((2,), t))
        stepped.append(y)

    def plain(q, k, v, log_decay, *, scale, state, **how):
        zeros = torch.zeros(2, 32, q.shape[-1], v.shape[-1])
        return plain_retention(q, k, v, log_decay, scale=scale, state=zeros)

    with monkeypatch.context() as patch:
        patch.setattr("retentive.layers.retention.retention", plain)
        measure, _ = run(layer, x)
    gold, _ = run(layer.double(), x.double())
    # projections, norm and gate round alike in all; what differs is one rounding of several, averaged over 14400 values
    gold_rule(gold, test, measure, 0.1, "chunkwise")
    gold_rule(gold, torch.cat(stepped, 1), measure, 0.1, "step by step")


def test_under_autocast_the_state_is_float32_and_the_result_close(same):
    layer, x = make(dtype=torch.float32), torch.randn(2, 40, D)
    want, _ = run(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = run(layer, x)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    # bf16 keeps 8 bits, 0.4 % at worst and 0.2 % on average; some six roundings in a row add up as roots of squares
    same(out.float(), want, 0.01)
