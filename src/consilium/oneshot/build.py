"""A hub as one model: the public model with the parts of its sites, and a router between them.

    assemble      the live model, for scores
    write         a folder: for plain transformers if the family can hold the model, for PEFT's Arrow if it computes the
                  same, and for `built.load_built` otherwise

Everything that is fitted over several sites together (`fit_router`) depends on the packages, the rows and the seed
alone. A model that is built again after a withdrawal therefore equals that of a hub that never had the site.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from safetensors.torch import save_file
from torch import Tensor, nn

from consilium.constraints import NonNegativeInt, PositiveFloat, PositiveInt, check_settings
from consilium.errors import ConfigError, ModelError, PackageError
from consilium.export.folder import USE, new_folder
from consilium.machine import quietly
from consilium.oneshot import routers
from consilium.oneshot.adapters import Pair, attach, deltas
from consilium.oneshot.base import Base, Frozen
from consilium.oneshot.guests import Guest, fuse, open_blocks
from consilium.oneshot.package import Package
from consilium.oneshot.routers import ADAPTER_ROUTERS, EXPERT_ROUTERS, JOINT, Router

__all__ = ["BUILT", "Building", "Format", "assemble", "fit_ridge", "kind_of", "write"]

Format = Literal["auto", "transformers", "peft", "consilium"]
BUILT, PARTS = "oneshot.json", "parts.safetensors"
PEFT_STEPS, PEFT_TOLERANCE = 15, 1e-2
"""Power iterations of PEFT's Arrow, and the largest error that they may leave in a prototype."""
_DEFAULT_K = {"arrow": 3, "phatgoose": 2, "ridge": 1}


@dataclass(frozen=True)
class Building:
    """The settings for building one model from the packages of a hub.

    Args:
        router: which site's part computes a token, see `routers`.
        top_k: sites per token, for `flexolmo` experts per token; 0: arrow 3, phatgoose 2, ridge 1, flexolmo those of
            the public model and as many as one site has.
        sites: sites to include; (): all.
        temperature: for arrow, > 0.
        sharpness: for ridge: factor of the regression before the softmax, > 0.
        strength: damping of the regression, for ridge and for `apart`, > 0.
        apart: for flexolmo: how far rows are moved away from the texts of other sites, if every package has moments; 0:
            rows stay as the sites trained them.
        tries: for lorahub: models that are scored in the search.
        seed: seed of the search.
    """

    router: Router = "arrow"
    top_k: NonNegativeInt = 0
    sites: tuple[str, ...] = ()
    temperature: PositiveFloat = 1.0
    sharpness: PositiveFloat = 8.0
    strength: PositiveFloat = 1e-3
    apart: Annotated[float, Interval(ge=0, lt=1e6)] = 20.0
    tries: PositiveInt = 40
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)


def kind_of(packages: Mapping[str, Package], router: Router, fitted: bool = False) -> str:
    """Return the kind of the packages, after checking that the router supports it.

    Args:
        fitted: the router has been fitted already, so the data for fitting may be absent.

    Raises:
        PackageError: for no package, packages of two kinds, or packages that lack what the router needs.
    """
    kinds = {package.kind for package in packages.values()}
    if len(kinds) != 1:
        raise PackageError(f"the sites' packages are of {len(kinds)} kinds; name sites of one kind by --sites")
    kind = kinds.pop()
    allowed_routers = EXPERT_ROUTERS if kind == "expert" else ADAPTER_ROUTERS
    if router not in allowed_routers:
        raise PackageError(
            f"router {router} is not for packages of kind {kind}; allowed are {', '.join(allowed_routers)}"
        )
    needed_part = {"phatgoose": "gate", "ridge": "" if fitted else "moment"}.get(router)
    lacking_sites = [site for site, package in packages.items() if needed_part and not package.part(needed_part)]
    if lacking_sites:
        flag = "--kind gated" if needed_part == "gate" else "--moments"
        raise PackageError(
            f"router {router} needs what {', '.join(lacking_sites)} did not train: use {flag} at the site"
        )
    return kind


def fit_ridge(
    packages: Mapping[str, Package], building: Building, public: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return module or block -> W [X + 1, classes] of the ridge router; the first class is the public rows, if any."""
    moments_by_path: dict[str, dict[str, Tensor]] = {}
    for site, package in packages.items():
        for path, moment in package.part("moment").items():
            moments_by_path.setdefault(path, {} if public is None else {"": public[path]})[site] = moment
    return {path: routers.solve_ridge(moments, building.strength) for path, moments in sorted(moments_by_path.items())}


def moved_apart(packages: Mapping[str, Package], building: Building) -> Mapping[str, Package]:
    """Return the packages of experts with rows moved away from the texts of other sites, and without moments.

    The packages are returned unchanged for another router, for `apart` 0, for one site, and if a site has no moments.
    """
    if building.router != "flexolmo" or not building.apart or not can_move(packages):
        return packages
    moved_packages = {}
    ways: dict[str, dict[str, Tensor]] = {}
    for site, package in sorted(packages.items()):
        for path, moment in package.part("moment").items():
            ways.setdefault(path, {})[site] = moment
    ways = {path: routers.directions(moments, building.strength) for path, moments in sorted(ways.items())}
    for site, package in packages.items():
        tensors = {name: t for name, t in package.tensors.items() if not name.endswith(".moment")}
        for path, guests in package.guests().items():
            for i, guest in enumerate(guests):
                way_D = building.apart * ways[path][site]
                tensors[f"{path}.guest.{i}.row"] = (guest.row_D.float() + way_D).to(guest.row_D.dtype)
        moved_packages[site] = replace(package, tensors=tensors)
    return moved_packages


def can_move(packages: Mapping[str, Package]) -> bool:
    """Return True if `moved_apart` has what it needs: at least two sites, all with moments."""
    return len(packages) > 1 and all(package.part("moment") for package in packages.values())


def assemble(
    base: Base, packages: Mapping[str, Package], building: Building, fitted: Mapping[str, Tensor] | None = None
) -> Frozen:
    """Return the live model of these packages.

    Args:
        fitted: for lorahub "weights" [E]; for ridge the result of `fit_ridge`.
    """
    fitted, packages = fitted or {}, moved_apart(packages, building)
    if kind_of(packages, building.router, fitted=bool(fitted)) == "expert":
        return _with_experts(base, packages, building, fitted)
    model = base.model()
    pairs = _pairs(packages)
    modules = attach(model, {path: list(site_pairs.values()) for path, site_pairs in pairs.items()})
    for path, module in modules.items():
        module.weigh = _weigh(path, pairs[path], packages, building, fitted)
        module.requires_grad_(False)
    return model


def _pairs(packages: Mapping[str, Package]) -> dict[str, dict[str, Pair]]:
    """Return module -> site -> adapter, sorted, of the sites that have an adapter there."""
    pairs_by_path: dict[str, dict[str, Pair]] = {}
    for site, package in sorted(packages.items()):
        for path, pair in package.pairs().items():
            pairs_by_path.setdefault(path, {})[site] = pair
    return dict(sorted(pairs_by_path.items()))


def _weigh(
    path: str,
    pairs: Mapping[str, Pair],
    packages: Mapping[str, Package],
    building: Building,
    fitted: Mapping[str, Tensor],
) -> routers.Weigh:
    """Return the router of one module."""
    if building.router == "arrow":
        return routers.arrow(list(pairs.values()), building.top_k or _DEFAULT_K["arrow"], building.temperature)
    if building.router == "phatgoose":
        gates = [packages[site].tensors[f"{path}.gate"] for site in pairs]
        return routers.phatgoose(gates, building.top_k or _DEFAULT_K["phatgoose"])
    if building.router == "ridge":
        w_XC = fitted[path]
        k = building.top_k or _DEFAULT_K["ridge"]
        return routers.ridge(w_XC, k, building.sharpness, w_XC.shape[1] > len(pairs))
    return routers.constant([_constants(packages, building, fitted)[site] for site in pairs])


def _constants(packages: Mapping[str, Package], building: Building, fitted: Mapping[str, Tensor]) -> dict[str, float]:
    """Return site -> coefficient, the same for all tokens."""
    if building.router == "uniform":
        return dict.fromkeys(packages, 1 / len(packages))
    return dict(zip(sorted(packages), fitted["weights"].tolist(), strict=True))


def _with_experts(
    base: Base, packages: Mapping[str, Package], building: Building, fitted: Mapping[str, Tensor]
) -> Frozen:
    model = base.open_model()
    blocks = open_blocks(model, _guests(packages), _checked_k(base, packages, building))
    for path, router in blocks.routers.items():
        if building.router == "ridge":
            router.adjust = _domain_score(fitted[path], packages, path, building)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _guests(packages: Mapping[str, Package]) -> dict[str, list[Guest]]:
    """Return block -> guests of all sites, in the order of the sites' names."""
    guests_by_block: dict[str, list[Guest]] = {}
    for _, package in sorted(packages.items()):
        for path, guests in package.guests().items():
            guests_by_block.setdefault(path, []).extend(guests)
    return guests_by_block


def _checked_k(base: Base, packages: Mapping[str, Package], building: Building) -> int:
    """Return the number of experts per token: by default that of the public model plus as many as one site has."""
    guest_counts = [len(guests) for package in packages.values() for guests in package.guests().values()]
    public_count = 1 if base.family is None else min(base.source.counts.values())
    maximum = public_count + min(len(guests) for guests in _guests(packages).values())
    k = base.top_k + max(guest_counts)
    if building.router == "flexolmo" and building.top_k:
        k = building.top_k
    if not 1 <= k <= maximum:
        raise ConfigError(f"--top-k is {k}; it must be within 1..{maximum}, the experts of a layer")
    return k


def _domain_score(w_XC: Tensor, packages: Mapping[str, Package], path: str, building: Building) -> routers.Weigh:
    """Return x -> log of the ridge regression's share of each guest's site.

    A row keeps the logit that its site trained on tokens of the site's domain, and loses on others.
    """
    counts = [len(package.guests()[path]) for _, package in sorted(packages.items())]
    owner_G = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    offset = w_XC.shape[1] - len(counts)  # 1 if the public rows are a class

    def adjust(x_ND: Tensor) -> Tensor:
        x = torch.cat([x_ND.float(), x_ND.new_ones(len(x_ND), 1, dtype=torch.float32)], dim=1)
        score_NC = torch.log_softmax(building.sharpness * (x @ w_XC.to(x.device)), dim=-1)
        return score_NC[:, offset:][:, owner_G.to(x.device)]

    return adjust


# --- folders ----------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    base: Base,
    packages: Mapping[str, Package],
    building: Building,
    fitted: Mapping[str, Tensor] | None = None,
    form: Format = "auto",
    told: Mapping[str, Any] | None = None,
) -> Format:
    """Write the model into a new folder and return its format.

    Args:
        form: auto: the first of transformers, peft and consilium that holds the model exactly.
        told: further entries of `oneshot.json`, e.g. the rows on which a router was fitted.

    Raises:
        ConfigError: for a format that cannot hold the model, with the reason.
    """
    fitted, packages = dict(fitted or {}), moved_apart(packages, building)
    kind = kind_of(packages, building.router)
    reasons = {"transformers": _not_plain(base, packages, building), "peft": _not_peft(packages, building)}
    output_format: Format = form
    if form == "auto":
        output_format = next(  # type: ignore[assignment]
            (f for f in ("transformers", "peft") if reasons[f] is None), "consilium"
        )
    elif reason := reasons.get(form):
        raise ConfigError(f"--format {form} cannot hold this model: {reason}; use --format consilium")
    with new_folder(folder) as staging:
        if output_format == "transformers":
            _write_plain(staging, base, packages, building, fitted)
            if base.family is not None or kind == "expert":  # `consilium predict` reads mixtures of experts
                (staging / USE).write_text(json.dumps(_use(base, packages), indent=1) + "\n")
        elif output_format == "peft":
            _write_peft(staging, base, packages)
        else:
            _write_parts(staging, packages, fitted)
        if output_format != "peft":
            base.source.tokenizer().save_pretrained(staging)
        record = {
            "format": output_format, "kind": kind, "building": asdict(building), "joint": building.router in JOINT,
            "model": base.source.path, "dtype": base.source.dtype, "fingerprint": base.source.fingerprint,
            "sites": {site: {"signature": p.signature, "scale": p.scale} for site, p in sorted(packages.items())},
            **(told or {}),
        }  # fmt: skip
        (staging / BUILT).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        (staging / "README.md").write_text(_card(record))
    return output_format


def _not_plain(base: Base, packages: Mapping[str, Package], building: Building) -> str | None:
    """Return why no checkpoint of plain transformers computes this model, or None if one does."""
    if building.router in ("uniform", "lorahub"):
        model = base.model()
        for path in _pairs(packages):
            if not isinstance(model.backbone.get_submodule(path), nn.Linear):
                return f"the adapters on {path} go around a whole block, which is no matrix to add them to"
        return None
    if building.router == "flexolmo":
        try:
            fuse(base.open_model(), _guests(packages), _checked_k(base, packages, building))
        except ModelError as error:
            return str(error)
        return None
    return f"transformers has no router of kind {building.router}"


def _not_peft(packages: Mapping[str, Package], building: Building) -> str | None:
    """Return why PEFT's Arrow does not compute this model, or None if it does."""
    if building.router != "arrow":
        return f"PEFT has no router of kind {building.router}"
    pairs = _pairs(packages)
    shapes = [
        {
            path: (pairs_by_site[site].a_RX.shape, pairs_by_site[site].b_YR.shape)
            for path, pairs_by_site in pairs.items()
            if site in pairs_by_site
        }
        for site in packages
    ]
    if any(shape != shapes[0] for shape in shapes):
        return "PEFT's Arrow needs the same modules and ranks at all sites"
    if len({path.rpartition(".")[2] for path in pairs} & {"mlp", "block_sparse_moe"}):
        return "PEFT adapts linear layers only, and some adapters go around whole blocks"
    for path, pairs_by_site in pairs.items():
        for site, pair in pairs_by_site.items():
            if (error := _power_error(pair)) > PEFT_TOLERANCE:
                return f"PEFT's {PEFT_STEPS} power iterations leave an error of about {error:.2g} at {path} of {site}"
    return None


def _power_error(pair: Pair) -> float:
    """Return the approximate error of power iterations in the top singular vector: (s_2 / s_1) ^ (2 steps)."""
    s_R = torch.linalg.svdvals(next(deltas([pair])))
    return float((s_R[1] / s_R[0]) ** (2 * PEFT_STEPS)) if len(s_R) > 1 and s_R[0] > 0 else 0.0


def _write_plain(
    folder: Path, base: Base, packages: Mapping[str, Package], building: Building, fitted: Mapping[str, Tensor]
) -> None:
    if building.router == "flexolmo":
        model = fuse(base.open_model(), _guests(packages), _checked_k(base, packages, building))
    else:
        model = base.model()
        weights = _constants(packages, building, fitted)
        for path, pairs_by_site in _pairs(packages).items():
            matrix = model.backbone.get_submodule(path).weight
            change = sum(
                weights[site] * delta
                for site, delta in zip(pairs_by_site, deltas(list(pairs_by_site.values())), strict=True)
            )
            matrix.data = (matrix.float() + change).to(matrix.dtype)
    with quietly():
        model.backbone.save_pretrained(folder)


def _write_peft(folder: Path, base: Base, packages: Mapping[str, Package]) -> None:
    """Write a PEFT folder for each site; `README.md` explains how to load them."""
    from peft import LoraConfig

    for site, package in sorted(packages.items()):
        pairs, site_folder = package.pairs(), folder / site
        rank = next(iter(pairs.values())).a_RX.shape[0]
        config = LoraConfig(
            r=rank, lora_alpha=package.scale * rank, target_modules=list(pairs), task_type="CAUSAL_LM",
            base_model_name_or_path=base.source.path, inference_mode=True,
        )  # fmt: skip
        config.target_modules = sorted(pairs)  # PEFT keeps a set, and its order differs from run to run
        site_folder.mkdir()
        config.save_pretrained(str(site_folder))
        tensors = {}
        for path, pair in pairs.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = pair.a_RX.contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = pair.b_YR.contiguous()
        save_file(tensors, site_folder / "adapter_model.safetensors", {"format": "pt"})


def _write_parts(folder: Path, packages: Mapping[str, Package], fitted: Mapping[str, Tensor]) -> None:
    """Write all parts into one file, with the fitted router and without the sums that only the hub needs."""
    tensors = {
        f"{site}/{name}": tensor.contiguous()
        for site, package in sorted(packages.items())
        for name, tensor in package.tensors.items()
        if not name.endswith(".moment")
    }
    tensors |= {f"/{name}": tensor.contiguous() for name, tensor in fitted.items()}
    save_file(tensors, folder / PARTS, {"format": "pt"})


def _use(base: Base, packages: Mapping[str, Package]) -> dict[str, Any]:
    """Return how `consilium predict` and `chat` use the model: they read text as the sites read their own data."""
    settings = [package.settings for _, package in sorted(packages.items())]
    lengths = {name: max(int(s["fit"][name]) for s in settings) for name in ("max_length", "target_length")}
    return {
        "format": "transformers", "kind": settings[0]["kind_of_text"], "form": "text-to-text",
        "dtype": base.source.dtype, "tasks": {}, **lengths,
    }  # fmt: skip


_LOADING = {
    "transformers": """model = AutoModelForCausalLM.from_pretrained(folder)""",
    "peft": """base = AutoModelForCausalLM.from_pretrained({model!r})
    config = ArrowConfig(top_k={k}, router_temperature={temperature})
    model = create_arrow_model(base, [f"{{folder}}/{{site}}" for site in {sites}], config)""",
    "consilium": """model = consilium.oneshot.built.load_built(Path(folder)).backbone""",
}


def _card(record: Mapping[str, Any]) -> str:
    building = record["building"]
    sites = sorted(record["sites"])
    k = min(building["top_k"] or _DEFAULT_K["arrow"], len(sites))
    instructions = _LOADING[record["format"]].format(
        model=record["model"], k=k, temperature=building["temperature"], sites=sites
    )
    joint = "It was fitted over all sites together: build it again after a withdrawal.\n\n" if record["joint"] else ""
    return f"""# Parts of {len(sites)} sites, put together

Router {building["router"]}, parts of {", ".join(sites)}, on the public model {record["model"]}.

{joint}    {instructions}
"""
