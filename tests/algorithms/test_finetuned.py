"""FedAvgFT and FedProxFT: the federation is the plain one, the score that of the model after fine-tuning."""

import dataclasses

import pytest
import tiny

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedprox import FedProx
from consilium.algorithms.finetuned import FedAvgFT, FedProxFT
from consilium.core import Payload
from consilium.errors import BudgetError
from consilium.work import Work


@pytest.mark.parametrize(("tuned", "plain"), [(FedAvgFT, FedAvg), (FedProxFT, FedProx)])
def test_training_is_the_plain_methods(tuned, plain):
    setup = tiny.setup()
    sent = plain().server(setup).deliver(tiny.context().info)
    assert tiny.payloads_equal(
        tuned().client(setup).train(sent, tiny.context()), plain().client(setup).train(sent, tiny.context())
    )


def test_the_score_is_of_the_model_after_so_many_epochs():
    """A client that fine-tunes what it was sent scores as the model it would have sent back."""
    setup, context = tiny.small_setup("cohort", epochs=5), tiny.small_context(world="cohort")
    sent = FedAvg().server(setup).deliver(context.info)
    trained = FedAvg().client(setup).train(sent, context)
    expected = FedAvg().client(setup).evaluate(Payload({"params": trained.group("params")}), context)
    found = FedAvgFT(personal=5).client(setup).evaluate(sent, context)
    assert found.scalars["score"] == expected.scalars["score"]
    assert context.state.empty


def test_fine_tuning_before_a_score_needs_the_memory_of_training():
    """Room for scoring alone is not enough: what is trained is admitted as training."""
    setup, context = tiny.setup(), tiny.context()
    sent = FedAvg().server(setup).deliver(context.info)
    need = setup.footprint(setup.model.counts).total
    assert setup.footprint(setup.model.counts, "forward").total < need
    short = dataclasses.replace(context, work=Work(memory=need - 1))
    FedAvg().client(setup).evaluate(sent, short)
    with pytest.raises(BudgetError, match=r"takes .* bytes"):
        FedAvgFT().client(setup).evaluate(sent, short)
