"""FedCKD and pFedSD: the loss by hand, which teacher when, and that without teachers it is FedAvg."""

import math

import pytest
import tiny
import torch

from consilium.algorithms import fedckd
from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedckd import FedCKD, distilled, pFedSD
from consilium.core import ClientState


def test_the_loss_by_hand():
    """tau = 2: teacher logits (2 ln 3, 0) are (ln 3, 0), probabilities 3/4 and 1/4; the student's even:
    KL = 3/4 ln(3/2) + 1/4 ln(1/2). Weights 1/2, times 4."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]])
    expected = 0.5 * 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert distilled(student, [(0.5, teacher)], 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert distilled(student, [], 2.0).item() == 0


def test_the_gradient_is_zero_where_the_student_is_its_teacher():
    student = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    distilled(student, [(1.0, student.detach())], 3.0).backward()
    torch.testing.assert_close(student.grad, torch.zeros(3, 4), rtol=0, atol=1e-6)


def round_of(method, state=None):
    made = tiny.small_setup("cohort", clients_per_round=4)
    server, client = method.server(made), method.client(made)
    context = tiny.small_context("animal-00", "cohort", state=state)
    return client.train(server.deliver(context.info), context), context


def test_without_teachers_it_is_fedavg():
    plain, _ = round_of(FedAvg())
    reply, context = round_of(FedCKD(lam_g=0.0, lam_h=0.0))
    assert tiny.same(plain.group("params"), reply.group("params"))
    assert tiny.same(context.state.params, reply.group("params")) and set(reply.groups) == {"params"}


@pytest.mark.parametrize(("method", "first", "later"), [(FedCKD(), 1, 2), (pFedSD(), 0, 1)], ids=["FedCKD", "pFedSD"])
def test_teachers(method, first, later, monkeypatch):
    """The own model teaches from the second participation on; at first it is FedAvg for pFedSD."""
    counted = []

    def spy(logits, said, tau):
        counted.append(len(said))
        return distilled(logits, said, tau)

    monkeypatch.setattr(fedckd, "distilled", spy)
    reply, context = round_of(method)
    assert set(counted) == ({first} if first else set())
    if not first:
        assert tiny.same(reply.group("params"), round_of(FedAvg())[0].group("params"))
    counted.clear()
    round_of(method, ClientState(context.state.params))
    assert set(counted) == {later}


def test_it_predicts_with_its_own_model_or_the_average():
    made = tiny.small_setup("cohort", clients_per_round=4)
    for deploy in ("trained", "aggregated"):
        method = FedCKD(deploy=deploy)
        server, client = method.server(made), method.client(made)
        context = tiny.small_context("animal-00", "cohort")
        sent = server.deliver(context.info)
        zero = {key: torch.zeros_like(t) for key, t in sent.group("params").items()}
        context.state.params = {**zero, "head.corner.b.bias": torch.ones(())}  # always says b
        found = client.evaluate(sent, context).scalars["score"]
        always_b = sum(text == "b" for text in context.data.test.texts) / 4
        other = round(found, 6) == round(
            client.evaluate(sent, tiny.small_context("animal-00", "cohort")).scalars["score"], 6
        )
        assert found == always_b if deploy == "trained" else other
