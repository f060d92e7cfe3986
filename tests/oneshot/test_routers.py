"""Routers by hand, and Arrow against PEFT."""

import math

import pytest
import sites
import torch

from consilium.errors import ConfigError
from consilium.oneshot.adapters import Pair
from consilium.oneshot.build import Building, assemble
from consilium.oneshot.routers import arrow, constant, directions, phatgoose, prototype, ridge, solve_ridge


def pair(seed, x=6, y=5, r=2):
    rng = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(r, x, generator=rng), torch.randn(y, r, generator=rng), 1.0)


def test_a_prototype_is_the_top_right_singular_vector_of_the_product():
    for seed in range(5):
        one = pair(seed)
        _, _, vh = torch.linalg.svd(one.b_YR @ one.a_RX)
        assert abs(float(prototype(one) @ vh[0])) > 1 - 1e-6
        assert torch.allclose(prototype(one), prototype(Pair(one.a_RX, -7 * one.b_YR, 3.0)), atol=1e-6)  # of the line


def test_arrow_by_hand():
    """A = e_i^T, B = any column: the prototypes are unit vectors. x = (3, -2, 1): |logits| 3, 2, 1; of the two largest
    the softmax gives e^3 / (e^3 + e^2) = 1 / (1 + e^-1) = 0.731 and 0.269."""
    pairs = [Pair(torch.eye(3)[i : i + 1], torch.ones(4, 1), 1.0) for i in range(3)]
    weights = arrow(pairs, 2)(torch.tensor([[3.0, -2.0, 1.0]]))
    share = 1 / (1 + math.exp(-1))
    assert torch.allclose(weights, torch.tensor([[share, 1 - share, 0.0]]), atol=1e-6)
    assert torch.equal(arrow(pairs[:1], 3)(torch.randn(4, 3)), torch.ones(4, 1))  # one expert: plain LoRA


def test_phatgoose_by_hand():
    """x = (1, -1) and v_1 = x, v_2 = -x are standardised to themselves: logits (2, -2) / sqrt(2). Top-2 of 2 is the
    softmax, top-1 is all on the first."""
    gates = [torch.tensor([1.0, -1.0]), torch.tensor([-3.0, 3.0])]
    x = torch.tensor([[1.0, -1.0]])
    first = 1 / (1 + math.exp(-4 / math.sqrt(2)))
    assert torch.allclose(phatgoose(gates, 2)(x), torch.tensor([[first, 1 - first]]), atol=1e-4)
    assert torch.equal(phatgoose(gates, 1)(x), torch.tensor([[1.0, 0.0]]))


def test_the_order_of_sites_does_not_matter_to_arrow_and_phatgoose():
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    pairs, order = [pair(seed) for seed in range(4)], [2, 0, 3, 1]
    gates = [one.a_RX[0] for one in pairs]
    for router, parts in ((arrow, pairs), (phatgoose, gates)):
        mixed = router([parts[i] for i in order], 2)(x)
        assert torch.allclose(router(parts, 2)(x)[:, order], mixed, atol=1e-6)


def test_ridge_tells_two_clouds_apart_and_sums_can_be_taken_out():
    rng = torch.Generator().manual_seed(0)

    def moment(mean):
        x = torch.randn(200, 3, generator=rng) * 0.1 + torch.tensor(mean)
        x = torch.cat([x, torch.ones(200, 1)], dim=1)
        return x.t() @ x

    moments = {"a": moment([1.0, 0.0, 0.0]), "b": moment([0.0, 1.0, 0.0]), "c": moment([0.0, 0.0, 1.0])}
    w = solve_ridge(moments, 1e-3)
    weights = ridge(w, 1, 20.0, public=False)(torch.eye(3))
    assert torch.allclose(weights, torch.eye(3), atol=0.02)
    public = ridge(w, 2, 20.0, public=True)(torch.eye(3))  # the first class gets no part
    assert public.shape == (3, 2) and public[0].sum() < 0.02
    without = {name: m for name, m in moments.items() if name != "b"}
    assert torch.equal(solve_ridge(without, 1e-3), solve_ridge(dict(without), 1e-3))
    assert not torch.allclose(solve_ridge(without, 1e-3), w[:, [0, 2]], atol=1e-3)


def test_directions_by_hand():
    """Tokens (1, 0) at a and (0, 1) at b, of b twice as many: M_a + M_b = I, so w_a = (2 m_a - m_a - m_b) / (1 + 1)
    = (1, -1) / 2 at lambda = 1, and w_b = -w_a."""

    def moment(x, times):
        x = torch.tensor([*x, 1.0])
        return times * x[:, None] * x

    found = directions({"a": moment((1.0, 0.0), 3), "b": moment((0.0, 1.0), 6)}, 1.0)
    assert torch.allclose(found["a"], torch.tensor([0.5, -0.5])) and torch.equal(found["b"], -found["a"])


def test_constants_and_limits():
    assert torch.equal(constant([0.25, 0.75])(torch.randn(2, 5)), torch.tensor([[0.25, 0.75]] * 2))
    with pytest.raises(ConfigError, match="at least 1"):
        arrow([pair(0)], 0)
    with pytest.raises(ConfigError, match="top_k is -1"):
        Building(top_k=-1)


def test_pefts_arrow_and_ours_have_the_same_prototypes_and_logits(tmp_path):
    """On the tiny OLMoE with adapters of which the top singular value stands out, so that PEFT's 15 power iterations
    converge: |cosine| > 0.999 for every module and site, and equal logits of the models."""
    from peft import ArrowConfig, create_arrow_model
    from transformers import AutoModelForCausalLM

    from consilium.oneshot.build import write

    packages = {}
    for site in ("coast", "north", "south"):
        package = sites.signed("adapter", site)
        for path, one in package.pairs().items():  # rank one stands out: scale a column
            b = one.b_YR.clone()
            b[:, 0] *= 20
            package.tensors[f"{path}.lora_B"] = b
        packages[site] = package
    building = Building("arrow", top_k=2)
    base = sites.base()
    ours = assemble(base, packages, building)
    form = write(tmp_path / "built", base, packages, building)
    sites.signed.cache_clear()  # the packages were changed here
    assert form == "peft"

    config = ArrowConfig(top_k=2, router_temperature=1.0, rng_seed=0)
    public = AutoModelForCausalLM.from_pretrained(base.source.path)
    theirs = create_arrow_model(public, [str(tmp_path / "built" / site) for site in packages], config)
    batch = sites.batch()
    with torch.no_grad():
        logits = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    assert torch.allclose(logits.flatten(0, 1), sites.logits(ours), atol=1e-4)
    seen = 0
    for path, module in theirs.named_modules():
        for arrow_layer in getattr(module, "lora_arrow", {}).values() if hasattr(module, "lora_arrow") else ():
            own = [prototype(p.pairs()[path.removeprefix("base_model.model.")]) for p in packages.values()]
            cosine = (torch.stack(own) * arrow_layer.prototypes).sum(1).abs()
            assert (cosine > 0.999).all()
            seen += 1
    assert seen == len(next(iter(packages.values())).pairs())
