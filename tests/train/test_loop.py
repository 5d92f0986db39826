"""The loop against losses and gradients computed plainly, and against golden losses.

The golden files hold the losses of 20 steps on the stories of conftest.py, so that a diff shows every change of the
computation. For an intended change, the failure's message holds the new lines.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import retentive
from retentive.data.packed import Packed
from retentive.evals.heldout import HeldOut
from retentive.files import load_tensors
from retentive.models import ARCHITECTURES, build, retnet, transformer, twin
from retentive.train import TrainConfig, language_modelling
from retentive.train.checkpoints import folders
from retentive.train.speed import pick_precision
from retentive.train.step import Training, accumulate_gradients
from tests.configs import changed, hybrid

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = retnet(dim=32, layers=2, heads=2)
PAPER = changed(TINY, **ARCHITECTURES["retnet-paper"])
CONSTANT = {
    "retnet": TINY,
    "hybrid-window": hybrid(dim=32, layers=2, heads=2, attention_every=2, attention_window=40),
    "twin-sinks": transformer(dim=32, layers=2, heads=2, attention_window=9, attention_sinks=2),
    "twin-window": transformer(dim=32, layers=2, heads=2, attention_window=9, forget_gate=True, qk_norm=True),
}
"""Models whose state has constant size."""
CPU = torch.device("cpu")
EOS = 256
# float64 has 53 bits, 1e-16: two layers, losses of 128 tokens and their gradients summed in another order cost a lot
EXACT = 1e-12


def losses(metrics: list[dict]) -> list[float]:
    return [line["loss"] for line in metrics if "loss" in line]


def double(config, seed=0):
    torch.manual_seed(seed)
    return build(config).double()


@pytest.mark.parametrize(
    ("name", "config"), [("retnet", TINY), ("retnet-paper", PAPER), ("twin", twin(PAPER))], ids=lambda x: str(x)[:12]
)
def test_golden_losses(name, config, run, metrics):
    got = losses(metrics(run("golden", model=config, steps=20, lr=5e-3, warmup=5)))
    want = [
        float(line) for line in (GOLDEN / f"{name}_losses.txt").read_text().splitlines() if not line.startswith("#")
    ]
    # other instruction sets sum in another order: 1e-7 off, measured with SSE4, AVX2 and AVX-512; starting weights that
    # are 1e-7 off end 2e-7 off. Fifty times that for processors and versions not tried
    assert got == pytest.approx(want, rel=1e-5), "\n".join(f"{x:.6f}" for x in got)


def test_the_loss_falls_from_chance_to_below_that_of_single_letters(run, metrics, packed):
    loss = losses(metrics(run("a", steps=60, lr=1e-2)))
    # a fresh model's logits are about N(0, 1), which costs half a nat over a uniform guess
    assert math.log(257) < loss[0] < math.log(257) + 1
    ids = Packed(packed).batches(mode="packed", batch=1, length=5000)[0].ids
    p = ids.flatten().bincount() / ids.numel()
    assert sum(loss[-5:]) / 5 < torch.special.entr(p).sum(), "letters are told from what stands before them"


@pytest.mark.parametrize("mode", ["reset", "packed"])
@pytest.mark.parametrize("config", [TINY, twin(TINY)], ids=["retnet", "twin"])
def test_gradients_of_a_step_are_the_mean_of_its_batches(config, mode, packed, same):
    """Against torch's cross-entropy of each document's logits by themselves, batch by batch."""
    model = double(config)
    batches = Packed(packed).batches(mode=mode, batch=4, length=32)
    step, accumulate = 2, 3
    options = TrainConfig(accumulate=accumulate, precision="fp32")
    training = Training(model, batches, language_modelling, options, step=step)
    loss, tokens = accumulate_gradients(training)
    want = torch.zeros((), dtype=torch.float64)
    for index in range(step * accumulate, (step + 1) * accumulate):
        batch = batches[index]
        rows, targets = batch.ids, batch.targets
        cuts = [128] if batch.cu_seqlens is None else batch.cu_seqlens.diff().tolist()
        if batch.cu_seqlens is None:  # rows of their own
            parts = list(zip(rows.split(1), targets.split(1), strict=True))
        else:
            parts = list(zip(rows.split(cuts, 1), targets.split(cuts, 1), strict=True))
        total = sum(F.cross_entropy(model(x)[0][0], y[0], reduction="sum") for x, y in parts)
        want = want + total / 128 / accumulate
    assert training.carried is None and tokens == accumulate * 4 * 32
    assert loss == pytest.approx(want.item(), rel=EXACT)
    got = [p.grad for p in model.parameters()]
    same(got, torch.autograd.grad(want, list(model.parameters())), EXACT)


@pytest.mark.parametrize("config", CONSTANT.values(), ids=CONSTANT)
def test_carried_on_is_read_whole(config, packed, run, metrics):
    """With constant weights, the losses of consecutive batches are those of whole documents read at once."""
    rows, length, steps = 4, 32, 12
    options = dict(accumulate=2, steps=steps // 2, lr=1e-300, weight_decay=0.0)
    folder = run("carry", model=double(config), mode="carry", **options)
    got = losses(metrics(folder))
    batches = Packed(packed).batches(mode="carry", batch=rows, length=length)
    assert steps < batches.steps_per_epoch
    whole = [
        torch.cat([getattr(batches[i], name).view(rows, length) for i in range(steps)], 1)
        for name in ("ids", "targets")
    ]
    model, pieces, longest = double(config), torch.zeros(rows, steps * length, dtype=torch.float64), 0
    for row, (ids, targets) in enumerate(zip(*whole, strict=True)):
        starts = sorted({0, *(ids == EOS).nonzero().flatten().tolist()})
        for a, b in zip(starts, [*starts[1:], len(ids)], strict=True):
            with torch.no_grad():
                logits, _ = model(ids[None, a:b])
            pieces[row, a:b] = F.cross_entropy(logits[0], targets[a:b], reduction="none")
            longest = max(longest, b - a)
    assert longest > 3 * length, "some documents last several batches"
    want = pieces.view(rows, steps // 2, 2 * length).mean((0, 2)).tolist()
    assert got == pytest.approx(want, rel=EXACT)
    reset = losses(metrics(run("reset", model=double(config), steps=2, lr=1e-300, weight_decay=0.0)))
    assert reset[0] != pytest.approx(got[0], rel=1e-3)


def test_the_carried_state_is_cut_off_from_the_graph(packed):
    batches = Packed(packed).batches(mode="carry", batch=4, length=32)
    options = TrainConfig(precision="fp32")
    training = Training(build(TINY), batches, language_modelling, options)
    accumulate_gradients(training)
    carried = training.carried
    assert all(not x.requires_grad for x in carried.tensors()) and len(carried.position) == 4


def test_recomputed_activations_change_nothing(run, same_end):
    """The second forward pass of a block draws the same dropout as the first."""
    config = replace(TINY, dropout=0.1)
    same_end(run("recomputed", model=config, checkpoint_activations=True), run("kept", model=config))


def test_bf16_stays_close_and_weights_stay_float32(run, metrics):
    bf16, fp32 = run("bf16", precision="bf16"), run("fp32")
    model, _ = retentive.load(bf16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # bf16 keeps 8 bits: 0.4 % a rounding at most, and a loss is the mean of 128 tokens
    assert losses(metrics(bf16)) == pytest.approx(losses(metrics(fp32)), rel=0.01)
    assert losses(metrics(bf16)) != losses(metrics(fp32))


def test_the_seed_orders_the_data_and_draws_the_dropout(run, metrics):
    config = replace(TINY, dropout=0.1)
    first, again, other = (losses(metrics(run(f"{n}", model=config, seed=s))) for n, s in enumerate((0, 0, 1)))
    assert first == again != other


def test_dropout_differs_from_step_to_step(run, metrics, monkeypatch):
    """On the same batch with constant weights, only the masks can change the loss."""
    monkeypatch.setattr("retentive.data.loader.Batches.__getitem__", lambda batches, step: batches._shuffled(0))
    still = dict(lr=1e-300, weight_decay=0.0, steps=4)
    got = losses(metrics(run("dropped", model=replace(TINY, dropout=0.5), **still)))
    assert len(set(got)) == 4
    assert len(set(losses(metrics(run("kept", model=TINY, **still))))) == 1


def test_the_gradient_is_clipped_to_its_norm(run, metrics):
    """The log records the norm before clipping; AdamW's second moment shows the clipped gradient."""
    folder = run("clipped", steps=1, clip=1e-3, warmup=0)
    assert metrics(folder)[0]["grad_norm"] > 1e-2
    moments = load_tensors(folders(folder)[-1] / "optimizer.safetensors")[0]
    squares = sum(x.sum() for name, x in moments.items() if name.startswith("exp_avg_sq"))
    # after one step the moment is (1 - beta2) g^2; float32 rounds each to 6e-8
    assert squares.sqrt().item() == pytest.approx(1e-3 * math.sqrt(1 - 0.98), rel=1e-4)
    free = run("free", steps=1, clip=0.0, warmup=0)
    moments = load_tensors(folders(free)[-1] / "optimizer.safetensors")[0]
    squares = sum(x.sum() for name, x in moments.items() if name.startswith("exp_avg_sq"))
    assert squares.sqrt().item() == pytest.approx(metrics(free)[0]["grad_norm"] * math.sqrt(1 - 0.98), rel=1e-4)


def test_metrics_tell_every_step_and_evaluation(run, metrics):
    asked = []

    def evaluate(model, tokens):
        asked.append(tokens)
        return HeldOut(2.0, 3.0, tokens, 1000)

    lines = metrics(run("a", steps=7, warmup=4, lr=0.5e-3, eval_every=3, eval_tokens=50, evaluate=evaluate))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    assert [line["lr"] for line in lines if "loss" in line][:4] == pytest.approx([1.25e-4, 2.5e-4, 3.75e-4, 5e-4])
    assert [line["step"] for line in lines if "bits_per_byte" in line] == [3, 6, 7]
    assert [line["step"] for line in lines if "final_bits_per_byte" in line] == [7]
    assert asked == [50, 50, 50, 500]


def test_held_out_text_that_is_read_whole_is_not_read_again(run, metrics):
    """30 tokens have 29 targets, and an evaluation of more reads the same."""
    asked = []

    def evaluate(model, tokens):
        asked.append(tokens)
        return HeldOut(2.0, 3.0, 29, 1000)

    lines = metrics(run("a", steps=1, eval_tokens=50, evaluate=evaluate))
    assert asked == [50] and lines[-1]["final_bits_per_byte"] == 3.0


def test_the_run_can_be_loaded_from_its_first_minute_and_holds_its_options(run, caplog):
    seen = {}

    def look(model):
        loaded, tokenizer = retentive.load(seen["folder"])
        seen["same"] = all(map(torch.equal, loaded.parameters(), model.parameters()))
        seen["eos"] = tokenizer.eos_id

    seen["folder"] = run("a", steps=1).with_name("b")
    folder = run("b", steps=2, lr=0.25, at=0, act=look)
    assert seen["same"] and seen["eos"] == EOS
    assert caplog.messages == [f"{folder} has trained nothing yet: its weights are the initial ones; resume the run"]
    options = json.loads((folder / "train.json").read_text(encoding="utf-8"))["train"]
    assert (options["lr"], options["steps"], options["precision"]) == (0.25, 2, "fp32")
    model, _ = retentive.load(folder)
    assert model.config == TINY and len(caplog.messages) == 1


@pytest.mark.parametrize(("speed", "want"), [(1.2, "fp32"), (1.4, "bf16")], ids=["hardly-faster", "faster"])
def test_auto_takes_bf16_where_it_is_faster(speed, want, monkeypatch):
    rate = {torch.float32: 1.0, torch.bfloat16: speed}
    monkeypatch.setattr("retentive.train.speed.gemm_rate", lambda device, dtype, **how: rate[dtype])
    assert pick_precision("auto", CPU) == want
    assert (pick_precision("fp32", CPU), pick_precision("bf16", CPU)) == ("fp32", "bf16")


def test_a_gpu_without_bf16_trains_in_fp32(monkeypatch, refuses):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    assert pick_precision("auto", torch.device("cuda")) == "fp32"
    with refuses("`precision='bf16'` needs a GPU of compute capability 8.0 or newer, this is Tesla T4: take fp32"):
        pick_precision("bf16", torch.device("cuda"))


def test_what_auto_meant_at_first_it_means_on_resuming(run, monkeypatch, same_end):
    rate = {torch.float32: 1.0, torch.bfloat16: 2.0}
    monkeypatch.setattr("retentive.train.speed.gemm_rate", lambda device, dtype, **how: rate[dtype])
    whole = run("whole", steps=4, precision="auto", save_every=2)

    def stop(model):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run("stopped", steps=4, precision="auto", save_every=2, at=3, act=stop)
    rate[torch.bfloat16] = 0.5
    stopped = run("stopped", steps=4, precision="auto", save_every=2, resume=True)
    assert json.loads((stopped / "train.json").read_text(encoding="utf-8"))["train"]["precision"] == "bf16"
    same_end(stopped, whole)
