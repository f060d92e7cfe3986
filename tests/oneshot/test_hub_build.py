"""A hub as one model: what plain transformers, PEFT and our own loader read is the model that was put together."""

import json
from dataclasses import replace

import pytest
import sites
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM

from consilium.errors import ConfigError, ModelError, PackageError
from consilium.export.predict import Taken
from consilium.moe.build import ModelSource
from consilium.oneshot.base import OPEN_FAMILIES, Base
from consilium.oneshot.build import Building, assemble, kind_of, write
from consilium.oneshot.built import load_built
from consilium.oneshot.evaluate import alone, fit_router
from consilium.oneshot.guests import Guest, fuse, open_blocks
from consilium.oneshot.train import Training

NAMES = ("coast", "north", "south")


def packages(kind, model="olmoe"):
    return {site: sites.signed(kind, site, model) for site in NAMES}


def plain_logits(folder):
    model, batch = AutoModelForCausalLM.from_pretrained(folder).eval(), sites.batch()
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return out.flatten(0, 1)


@pytest.mark.parametrize(
    ("kind", "model", "router", "form"),
    [
        ("expert", "olmoe", "flexolmo", "transformers"),
        ("expert", "llama", "flexolmo", "transformers"),
        ("adapter", "olmoe", "uniform", "transformers"),
        ("adapter", "llama", "uniform", "transformers"),
        ("adapter", "olmoe", "arrow", "peft"),
        ("gated", "olmoe", "phatgoose", "consilium"),
        ("gated", "olmoe", "ridge", "consilium"),
        ("expert", "olmoe", "ridge", "consilium"),
    ],
)
def test_what_is_written_is_the_model_that_was_put_together(tmp_path, kind, model, router, form):
    parts, base, building = packages(kind, model), sites.base(model), Building(router, top_k=2)
    fitted = fit_router(base, parts, building, None)
    live = sites.logits(assemble(base, parts, building, fitted))
    assert write(tmp_path / "built", base, parts, building, fitted) == form
    read = plain_logits(tmp_path / "built") if form == "transformers" else sites.logits(load_built(tmp_path / "built"))
    assert torch.allclose(read, live, atol=1e-4)
    if form == "transformers":
        assert torch.allclose(sites.logits(load_built(tmp_path / "built")), live, atol=1e-4)
        if (tmp_path / "built/consilium.json").exists():
            assert isinstance(Taken.of(tmp_path / "built").written("old house cat", 4), str)
        assert (tmp_path / "built/consilium.json").exists() == (model == "olmoe" or kind == "expert")
        write(tmp_path / "own", base, parts, building, fitted, "consilium")
        assert torch.allclose(sites.logits(load_built(tmp_path / "own")), live, atol=1e-5)
    else:
        with pytest.raises(ConfigError, match="use --format consilium"):
            write(tmp_path / "plain", base, parts, building, fitted, "transformers")
        assert not (tmp_path / "plain").exists()


def test_one_site_alone_is_the_model_that_it_trained(tmp_path):
    """With its own bias, too; by an adapter with coefficient 1 and an expert next to the public ones."""
    for kind, bias in (("adapter", False), ("expert", False), ("expert", True)):
        folder = tmp_path / f"{kind}{bias}"
        trainer = sites.trainer(folder, "north", Training(kind, rank=4, bias=bias), rounds=2)
        trainer.run(folder)
        if bias:
            for router in trainer.opened.routers.values():
                router.biases[0].data.fill_(-0.7)
        trained = sites.logits(trainer.model)
        assert torch.allclose(sites.logits(alone(sites.base(), trainer.package({}))), trained, atol=1e-5)


def with_bias(parts, value):
    """The packages with a bias on every router row."""
    return {
        site: replace(
            package,
            router="row+bias",
            tensors={
                **package.tensors,
                **{f"{n[:-4]}.bias": torch.tensor([value]) for n in package.tensors if n.endswith(".row")},
            },
        )
        for site, package in parts.items()
    }


def test_a_router_bias_is_kept_or_refused(tmp_path):
    """OLMoE's router has no bias: a checkpoint is refused, and the own format computes the same; a bias of 0, or above
    it, where min(b, 0) is 0, changes nothing."""
    base, building = sites.base(), Building("flexolmo")
    parts = with_bias(packages("expert"), -0.5)
    live = sites.logits(assemble(base, parts, building))
    assert not torch.allclose(live, sites.logits(assemble(base, packages("expert"), building)), atol=1e-3)
    with pytest.raises(ConfigError, match=r"biases \(-0.5.*no place for them"):
        write(tmp_path / "plain", base, parts, building, form="transformers")
    assert write(tmp_path / "own", base, parts, building) == "consilium"
    assert torch.allclose(sites.logits(load_built(tmp_path / "own")), live, atol=1e-5)
    for value in (0.0, 3.0):
        assert write(tmp_path / f"{value}", base, with_bias(packages("expert"), value), building) == "transformers"


@pytest.mark.parametrize("model_type", OPEN_FAMILIES)
def test_every_open_family_takes_guests_and_writes_them(tmp_path, model_type):
    """Random guests with and without biases: the open model equals the fused one, and what from_pretrained reads. In
    gpt-oss biases are the router's own."""
    base = Base(ModelSource(str(tiny.directory(model_type, "text-to-text")), "text-to-text"))
    rng = torch.Generator().manual_seed(0)
    public = base.open_model()
    guests = {}
    for path, block in Base.sparse(public).items():
        experts = block.get_submodule(public.family.experts)
        bias = torch.tensor(-0.3) if model_type == "gpt_oss" else None
        guests[path] = [
            Guest(
                {
                    n: getattr(experts, n)[i] + 0.1 * torch.randn(getattr(experts, n)[i].shape, generator=rng)
                    for n in public.family.tensors
                },
                torch.randn(32, generator=rng) * 0.3,
                bias,
            )
            for i in range(2)
        ]
    opened = base.open_model()
    open_blocks(opened, guests, 3)
    fused = fuse(base.open_model(), guests, 3)
    live = sites.logits(opened)
    assert torch.allclose(sites.logits(fused), live, atol=1e-5)
    assert not torch.allclose(live, sites.logits(public), atol=1e-3)
    fused.backbone.save_pretrained(tmp_path / "fused")
    again = getattr(transformers, tiny.FAMILIES[model_type].classes["text-to-text"]).from_pretrained(tmp_path / "fused")
    fused.backbone = again
    assert torch.allclose(sites.logits(fused), live, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted({*tiny.FAMILIES} - {*OPEN_FAMILIES} - {"switch_transformers"}))
def test_other_families_are_refused_by_name(model_type):
    base = Base(ModelSource(str(tiny.directory(model_type, "text-to-text")), "text-to-text"))
    with pytest.raises(ModelError, match=f"{tiny.FAMILIES[model_type].name} cannot take one more expert"):
        base.open_model()
    base = Base(ModelSource(str(tiny.directory("switch_transformers", "text-to-text")), "text-to-text"))
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        base.model()


def test_sites_may_have_different_ranks(tmp_path):
    """Which PEFT refuses, so that the own format is taken; the mean of the products is exact in plain transformers."""
    parts = {"north": sites.signed("adapter", "north"), "south": sites.signed("adapter", "south", rank=7)}
    base = sites.base()
    assert write(tmp_path / "arrow", base, parts, Building("arrow")) == "consilium"
    with pytest.raises(ConfigError, match="same modules and ranks"):
        write(tmp_path / "peft", base, parts, Building("arrow"), form="peft")
    assert write(tmp_path / "uniform", base, parts, Building("uniform")) == "transformers"
    live = sites.logits(assemble(base, parts, Building("uniform")))
    assert torch.allclose(plain_logits(tmp_path / "uniform"), live, atol=1e-5)


def test_adapters_around_whole_blocks_are_for_the_own_loader(tmp_path):
    parts = {site: sites.signed("adapter", site, targets="both") for site in NAMES[:2]}
    base = sites.base()
    assert write(tmp_path / "own", base, parts, Building("uniform")) == "consilium"
    live = sites.logits(assemble(base, parts, Building("uniform")))
    assert torch.allclose(sites.logits(load_built(tmp_path / "own")), live, atol=1e-6)
    with pytest.raises(ConfigError, match=r"goes around|go around"):
        write(tmp_path / "plain", base, parts, Building("uniform"), form="transformers")


def test_routers_say_what_they_need():
    with pytest.raises(PackageError, match="use --kind gated"):
        kind_of(packages("adapter"), "phatgoose")
    with pytest.raises(PackageError, match="use --moments"):
        kind_of(packages("adapter"), "ridge")
    with pytest.raises(PackageError, match="not for packages of kind expert"):
        kind_of(packages("expert"), "arrow")
    with pytest.raises(PackageError, match="of 2 kinds"):
        kind_of({"a": sites.signed("adapter", "north"), "b": sites.signed("expert", "south")}, "arrow")
    with pytest.raises(PackageError, match="of 0 kinds"):
        kind_of({}, "arrow")
    with pytest.raises(ConfigError, match=r"must be within 1..11"):
        assemble(sites.base(), packages("expert"), Building("flexolmo", top_k=12))


def test_a_built_model_needs_its_public_model(tmp_path):
    base, parts = sites.base(), packages("adapter")
    write(tmp_path / "built", base, parts, Building("arrow"))
    with pytest.raises(ModelError, match="another model than the one"):
        load_built(tmp_path / "built", str(sites.dense()))
    record = tmp_path / "built/oneshot.json"
    told = json.loads(record.read_text())
    record.write_text(json.dumps({**told, "sites": {**told["sites"], "west": {"scale": 1.0}}}))
    (tmp_path / "built/parts.safetensors").write_bytes(b"none")
    with pytest.raises(ModelError, match="is broken"):
        load_built(tmp_path / "built")
    with pytest.raises(ModelError, match="is not what"):
        load_built(tmp_path)
