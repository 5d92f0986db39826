"""Students begin as their teacher in a window, or as retention with the teacher's weights."""

import math
from dataclasses import replace

import pytest
import torch

from retentive.models import build, retnet, transformer
from retentive.models.students import half_lives, student, take_over
from retentive.ops import decay as decays

TEACHER = transformer(vocab_size=61, dim=64, layers=3, heads=4, kv_heads=2, tie_embeddings=True)


def taught(config, seed=1):
    torch.manual_seed(seed)
    teacher = build(config).double().eval()
    for p in teacher.parameters():  # every weight matters
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return teacher


def made(teacher, **how):
    model = build(student(teacher.config, **how)).double().eval()
    take_over(model, teacher)
    return model


def windows(config):
    return [b.mixer.window for b in config.blocks if b.mixer.kind == "attention"]


def test_a_student_beside_a_window_begins_as_the_teacher_in_that_window():
    teacher = taught(TEACHER)
    model = made(teacher, window=9, sinks=2)
    windowed = build(TEACHER.with_window(9, 2)).double().eval()
    windowed.load_state_dict(teacher.state_dict())
    ids = torch.randint(61, (2, 40))
    torch.testing.assert_close(model(ids)[0], windowed(ids)[0], rtol=0, atol=0)
    assert model.config.kinds == ("attention", "retention") * 3 and model.config.constant_state


def test_it_is_the_teacher_within_the_window():
    teacher = taught(TEACHER)
    ids = torch.randint(61, (1, 12))
    torch.testing.assert_close(made(teacher, window=12)(ids)[0], teacher(ids)[0], rtol=1e-12, atol=1e-12)


def test_retention_alone_has_the_teachers_projections_and_reads_all_tokens():
    teacher = taught(TEACHER)
    model = made(teacher, window=None)
    assert model.config.kinds == ("retention",) * 3 and model.config.constant_state
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        mine, theirs = (getattr(m.blocks[1].mixer, name).weight for m in (model, teacher))
        assert torch.equal(mine, theirs)
    ids = torch.randint(61, (1, 30))
    other = ids.clone()
    other[0, 0] += 1 - 2 * (other[0, 0] == 60)
    assert not torch.equal(model(ids)[0][0, -1], model(other)[0][0, -1])


def test_layers_that_keep_attention_are_the_teachers():
    teacher = taught(TEACHER)
    model = made(teacher, window=None, attention=(0, 2))
    assert model.config.kinds == ("attention", "retention", "attention") and not model.config.constant_state
    assert model.config.blocks[0] is TEACHER.blocks[0]
    model = made(teacher, window=7, attention=(1,))
    assert model.config.kinds == ("attention", "retention", "attention", "attention", "retention")
    assert windows(model.config) == [7, None, 7]


def test_each_layer_may_have_a_window_of_its_own():
    assert windows(student(TEACHER, window=(5, 40, 9))) == [5, 40, 9]
    assert windows(student(TEACHER, window=(5, 40, 9), attention=(1,))) == [5, None, 9]


def test_a_student_may_have_no_sinks():
    assert student(TEACHER, window=9, sinks=0).constant_state


@pytest.mark.parametrize(
    ("teacher", "how", "message"),
    [
        (retnet(vocab_size=9, dim=32, layers=1, heads=2), {}, "needs a teacher of attention alone, this is a RetNet"),
        (TEACHER, {"attention": (3,)}, "attention in layer 3: the teacher has layers 0 to 2"),
        (TEACHER, {"window": (8, 9)}, "2 windows for a teacher of 3 layers"),
        (TEACHER, {"window": 0}, "the window must be at least 1 token"),
        (TEACHER, {"heads": 3}, "key_dim 32 is not divisible by heads 3"),
    ],
)
def test_students_that_cannot_be(teacher, how, message):
    with pytest.raises(ValueError, match=message):
        student(teacher, **how)


def test_another_teacher_is_refused():
    other = taught(replace(TEACHER, blocks=TEACHER.blocks[:2]))
    with pytest.raises(ValueError, match="no student of this teacher"):
        take_over(build(student(TEACHER)), other)


def test_a_bias_gives_its_half_life():
    wanted = half_lives(5)
    log_decay = decays.of_tokens("gated", decays.bias_for("gated", -math.log(2) / wanted, 16.0), 16.0)
    torch.testing.assert_close((wanted * log_decay).exp(), torch.full((5,), 0.5, dtype=torch.float64))
    assert wanted[0].item() == pytest.approx(32) and wanted[-1].item() == pytest.approx(1024)
