"""What a rounded reply holds, by hand; what rounding loses comes later; what cannot be a change is refused."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.core import Payload
from consilium.engine.rounding import CHANGE, SCALE, restored, rounded
from consilium.errors import PayloadError

SENT = {"w": torch.tensor([[1.0, 2.0], [0.0, 0.0]])}


def test_int8_by_hand():
    """Changes [[127, 63.2], [0, -2]]: rows have the scales 1 and 2/127; 63.2 becomes 63, and 0.2 is lost."""
    reply = Payload({"params": {"w": SENT["w"] + torch.tensor([[127.0, 63.2], [0.0, -2.0]])}}, {"num_examples": 3})
    sent, lost = rounded(reply, SENT, "int8", {})
    assert sent.group(CHANGE)["w"].tolist() == [[127, 63], [0, -127]] and sent.group(CHANGE)["w"].dtype == torch.int8
    assert sent.group(SCALE)["w"].tolist() == pytest.approx([1, 2 / 127])
    assert lost["w"].tolist() == [pytest.approx([0, 0.2], abs=1e-5), pytest.approx([0, 0], abs=1e-6)]
    got = restored(sent, SENT)
    assert list(got.groups) == ["params"] and got.scalars == reply.scalars
    assert got.group("params")["w"].tolist() == [pytest.approx([128, 65]), pytest.approx([0, -2])]
    again, lost = rounded(Payload({"params": SENT}), SENT, "int8", lost)  # nothing trained: what was lost comes now
    assert restored(again, SENT).group("params")["w"][0, 1].item() == pytest.approx(2.2, abs=1e-5)


def test_bf16_by_hand():
    """1 + 2^-9 lies between the bfloat16 numbers 1 and 1 + 2^-7: it becomes 1, and 2^-9 is lost."""
    reply = Payload({"params": {"b": torch.tensor(1 + 2**-9)}})
    sent, lost = rounded(reply, {"b": torch.tensor(0.0)}, "bf16", {})
    assert sent.group(CHANGE)["b"].item() == 1 and lost["b"].item() == 2**-9
    assert sent.nbytes == 2


def test_exact_and_what_was_not_sent_travel_as_they_are():
    reply = Payload({"params": {"w": SENT["w"] + 1, "new": torch.ones(3)}, "usage": {"n": torch.tensor([3])}})
    assert rounded(reply, SENT, "exact", {})[0] is reply and restored(reply, SENT) is reply
    for form in ("bf16", "int8"):
        sent, lost = rounded(reply, SENT, form, {"old": torch.ones(1)})
        assert tiny.same(sent.group("params"), {"new": torch.ones(3)}) and set(lost) == {"w", "old"}
        got = restored(sent, SENT)
        assert tiny.same(got.group("usage"), reply.group("usage")) and set(got.group("params")) == {"w", "new"}


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12), st.sampled_from(["bf16", "int8"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_what_is_sent_and_what_is_lost_are_the_change(values, form, dtype):
    trained = torch.tensor(values).to(dtype)
    before = {"w": torch.full_like(trained, 0.5)}
    sent, lost = rounded(Payload({"params": {"w": trained}}), before, form, {})
    got = restored(sent, before).group("params")["w"]
    assert got.dtype == dtype and got.shape == trained.shape
    bound = trained.float().sub(0.5).abs().max() * (2**-8 if form == "bf16" else 1 / 254) + 1e-6
    assert lost["w"].abs().max() <= bound
    if dtype == torch.float32:
        assert torch.allclose(got + lost["w"], trained, atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize(
    "groups",
    [
        {CHANGE: {"x": torch.ones(2)}},
        {CHANGE: {"w": torch.ones(4)}},
        {CHANGE: {"w": torch.ones(2, 2, dtype=torch.int8)}},
        {CHANGE: {"w": torch.ones(2, 2, dtype=torch.int8)}, SCALE: {"w": torch.ones(3)}},
        {CHANGE: {"w": torch.ones(2, 2)}, SCALE: {"w": torch.ones(2)}},
    ],
    ids=["not sent", "another shape", "no scale", "scale of another length", "scale without need"],
)
def test_what_is_no_change_is_refused(groups):
    with pytest.raises(PayloadError):
        restored(Payload(groups), SENT)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_reply_without_weights_is_left_alone(form):
    """FedMoE's first stage answers with usage: no group may come of rounding that nobody asked for."""
    reply = Payload({"usage": {"b": torch.ones(2)}})
    sent, left = rounded(reply, {}, form, {"x": torch.ones(1)})
    assert sent == reply == restored(sent, {}) and set(left) == {"x"}
