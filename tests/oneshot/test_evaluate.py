"""Scores, contributions, poisoned packages, memorised text, and the page about a hub."""

import json
import math
from dataclasses import replace

import pytest
import sites
import tiny
import torch
from test_hub import files, new_hub

from consilium.errors import DataError, PackageError
from consilium.oneshot.build import Building
from consilium.oneshot.evaluate import Domains, alone, contributions, ensemble, fit_router, matrix
from consilium.oneshot.hub import Hub
from consilium.oneshot.package import to_bytes
from consilium.oneshot.report import page
from consilium.oneshot.trust import canaries, check, exposure, norm_of, with_canaries
from consilium.scoring import assess

NAMES = ("north", "south")


@pytest.fixture
def domains(tmp_path):
    """The test rows of two sites."""
    made = {site: sites.experiment(tmp_path, site) for site in NAMES}
    data = {site: next(iter(e.data.load(0).clients.values())) for site, e in made.items()}
    return Domains(made["north"], data)


def packages(kind="expert"):
    return {site: sites.signed(kind, site) for site in NAMES}


def test_scores_are_those_of_training(domains):
    """Bits per byte of `training.assess`, which counts bytes batch by batch."""
    model = sites.base().model()
    for name, score in domains.scores(model).items():
        told = assess(model, domains.rows[name], domains.context(name), domains.setup)
        assert score == pytest.approx(told["bits_per_byte"], rel=1e-5)
    assert domains.unit == "bits per byte"


def test_every_part_helps_its_own_domain_and_leaving_is_felt_there(domains):
    table = matrix(sites.base(), packages(), [Building("flexolmo")], domains)
    assert set(table) == {"public", "north", "south", "router flexolmo"}
    for site, other in (("north", "south"), ("south", "north")):
        assert table[site][site] < table["public"][site] and table[site][site] < table[other][site]
        assert table["router flexolmo"][site] < table["public"][site]
    worth = contributions(sites.base(), packages(), Building("flexolmo"), domains)
    assert worth["north"]["north"] > 0 and worth["south"]["south"] > 0
    assert worth["north"]["north"] > worth["north"]["south"]


def test_contributions_are_differences_of_scores(domains):
    base, parts = sites.base(), packages()
    found = contributions(base, parts, Building("flexolmo"), domains)
    whole = matrix(base, parts, [Building("flexolmo")], domains)
    for site, other in (("north", "south"), ("south", "north")):
        for name in NAMES:
            assert found[site][name] == pytest.approx(whole[other][name] - whole["router flexolmo"][name], abs=1e-6)


def test_an_ensemble_of_one_is_the_model_and_of_two_their_mean(domains):
    models = [alone(sites.base(), package) for package in packages().values()]
    one, both = ensemble(models[:1], domains), ensemble(models, domains)
    assert one == pytest.approx(domains.scores(models[0]), rel=1e-5)
    for name in NAMES:  # the mean of probabilities loses at most one bit a token against the better one
        better = min(domains.scores(model)[name] for model in models)
        rows = domains.rows[name]
        per_token = domains._unit(name) * math.log(2)
        assert both[name] <= better + per_token + 1e-5 and len(rows)


def test_lorahub_searches_from_zero_and_never_gets_worse(domains):
    parts, building = packages("gated"), Building("lorahub", tries=6)
    weights = fit_router(sites.base(), parts, building, domains)["weights"]
    assert weights.shape == (2,) and weights.abs().max() <= 1.5
    again = fit_router(sites.base(), parts, building, domains)["weights"]
    assert torch.equal(weights, again)
    table = matrix(sites.base(), parts, [building], domains, domains)
    mean = {name: sum(scores.values()) for name, scores in table.items()}
    assert mean["router lorahub"] <= mean["public"] + 1e-6
    with pytest.raises(DataError, match="searched on a few rows"):
        fit_router(sites.base(), parts, building, None)


# --- poisoned packages ------------------------------------------------------------------------------------------------


def poisoned(package, change):
    return replace(package, tensors={name: change(name, t) for name, t in package.tensors.items()})


@pytest.mark.parametrize("kind", ["adapter", "expert"])
def test_a_poisoned_package_is_flagged_with_its_reason(domains, kind):
    parts = {site: sites.signed(kind, site) for site in ("coast", "north", "south")}
    assert all(not found.reasons for found in check(sites.base(), parts))
    big = poisoned(parts["north"], lambda name, t: t * 10)
    reasons = {f.site: f.reasons for f in check(sites.base(), {**parts, "north": big})}
    assert "times as large as is usual" in reasons["north"][0] and not reasons["coast"] and not reasons["south"]
    assert norm_of(big) > 9 * norm_of(parts["north"])
    # Of the usual size, but it makes the model worse on rows that it should leave alone.
    rng = torch.Generator().manual_seed(0)
    noise = poisoned(
        parts["north"], lambda name, t: torch.randn(t.shape, generator=rng) * t.float().std().clamp(min=0.3)
    )
    public = replace(domains, data={"north": domains.data["north"]})
    trained = alone(sites.base(), parts["north"])
    from consilium.oneshot import trust

    good = public.scores(trained)["north"]
    bad = public.scores(alone(sites.base(), noise))["north"]
    assert bad > good
    before = trust.WORSE
    try:
        trust.WORSE = 0.5 * (good + bad) / public.scores(sites.base().model())["north"]
        reasons = {f.site: f.reasons for f in check(sites.base(), {"north": noise}, public)}
        assert "on public rows of north it scores" in reasons["north"][0]
        assert not check(sites.base(), {"north": parts["north"]}, public)[0].reasons
    finally:
        trust.WORSE = before


def test_canaries_that_were_trained_on_are_exposed(tmp_path):
    """Twenty repetitions of a canary over a long training: its loss ranks eighth or better of 64."""
    from consilium.oneshot.train import Training, site_data, train

    experiment = sites.experiment(tmp_path, "north", rounds=30, max_length=40, target_length=60)
    inside, outside = canaries(1, 1, words=2), canaries(1, 2, words=2)
    data = with_canaries(site_data(experiment), inside, 20)
    assert len(data.train) == 32 + 20 and data.train.targets[-1] == inside[0]
    package = train(experiment, "north", Training("expert", save_every=400), tmp_path / "state", data)
    model, tokenizer = alone(sites.base(), package), tiny.tokenizer()
    references = canaries(63, 3, words=2)
    found = exposure(model, tokenizer, [*inside, *outside], references)
    assert found[0] > found[1] and found[0] >= 3  # rank 8 or better of 64: log2(64 / 8)
    assert max(exposure(sites.base().model(), tokenizer, references[:3], references)) <= 6


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_says_who_brought_what_and_shows_foreign_text_as_text(tmp_path):
    from consilium.certificates import site_key

    hub = new_hub(tmp_path / "hub")
    hub.add(files("expert")["north"])
    card = {"about": "<script>alert(1)</script>", "licence": "CC-BY-4.0", "contact": "a@b.example", "validation": "x"}
    foreign = replace(sites.signed("expert", "south"), card=card).signed(site_key(tmp_path / "key"))
    (tmp_path / "south.safetensors").write_bytes(to_bytes(foreign))
    hub.add(tmp_path / "south.safetensors")
    scores = {
        "unit": "bits per byte", "router": "flexolmo", "matrix": {"public": {"d<": 2.0}, "north": {"d<": 1.0}},
        "contributions": {"north": {"d<": 0.25}},
    }  # fmt: skip
    text = page(Hub.open(hub.folder), scores)
    assert "CC-BY-4.0" in text and "<script" not in text and "&lt;script&gt;" in text
    assert "http:" not in text and "https:" not in text
    assert 'num best">1.000' in text and "+0.250" in text and "no promise" in text
    assert "Scores by domain" not in page(hub, {})
    with pytest.raises(PackageError, match="write them again"):
        page(hub, json.loads('{"matrix": {"a": 3}}'))
