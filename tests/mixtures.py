"""Every mixture of experts of the installed transformers, tiny: what each is checked for, and docs/families.md.

python tests/mixtures.py [MODEL_TYPE ...]      run all checks and write the page (of all types, if none is named)
"""

import json
import math
import os
import re
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import tiny
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.hfedmoe import HFedMoE
from consilium.core import ClientInfo, counts_of
from consilium.errors import BudgetError, ConsiliumError, ModelError, first_line
from consilium.moe.addressing import all_experts, expert_of, flatten, load_flat
from consilium.moe.budget import MemoryModel
from consilium.moe.build import ModelSource
from consilium.moe.discovery import classes_of, family_of, fitting_config
from consilium.moe.experts import Experts
from consilium.moe.files import load_sub_moe, save_sub_moe
from consilium.moe.gates import fold_gates
from consilium.moe.lora import Lora, add_lora, merged
from consilium.moe.probe import check_slices
from consilium.moe.routing import Tap
from consilium.moe.surgery import experts_in
from consilium.moe.twin import shrink, twin
from consilium.moe.uniform import uniform

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
MODELS = Path(transformers.__file__).parent / "models"
MIXTURE = re.compile(r"^@use_experts_implementation|^class \w*(?:Experts|CDMoE|SparseMLP)\(", re.MULTILINE)
"""What the source of a model has that holds routed experts."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
CHANGES: dict[str, dict] = {
    "deepseek_ocr2": dict(num_experts_per_tok=2, mlp_layer_types=["dense", "sparse", "sparse"]),
    "deepseek_v2": dict(num_experts_per_tok=2, topk_method="group_limited_greedy", n_group=4, topk_group=2),
    "dots1": dict(n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2),
    "ernie4_5_vl_moe": dict(rope_parameters=ROPE),
    "gemma4_text": dict(enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=16),
    "glm4v_moe": dict(rope_parameters=ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "hunyuan_v1_moe": dict(head_dim=16, num_experts=8, moe_topk=2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv"]),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=64, indexer_compress_ratio=4
    ),
    "switch_transformers": dict(
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        router_jitter_noise=0.0,
        num_sparse_encoder_layers=3,
        num_sparse_decoder_layers=3,
    ),
    "step3p7": dict(sliding_window=16),
}
"""Fields that the default configuration of a type leaves out, or that make it a mixture."""
SAMPLE = (
    "qwen3_5_moe_text", "gemma4_text", "granitemoehybrid", "lfm2_moe", "glm4_moe_lite", "minimax_m2", "nemotron_h",
    "jamba",
)  # fmt: skip
"""What the default run of the tests checks; `-m families` checks all."""


@cache
def types() -> tuple[str, ...]:
    """Return a model type for every folder of transformers that holds a mixture of experts with a text class."""
    sources = {path.parent.name: path.read_text() for path in MODELS.glob("*/modeling_*.py")}
    found: dict[str, str] = {}
    for kind in CONFIG_MAPPING_NAMES:
        module = model_type_to_module_name(kind)
        if module not in sources or not MIXTURE.search(sources[module]):
            continue
        try:
            config = fitting_config(AutoConfig.for_model(kind))
        except Exception:
            continue
        forms = classes_of(config)
        if "text-to-text" in forms or (forms and module not in found and kind == module):
            text = config.model_type
            if module not in found or text.endswith("_text"):
                found[module] = text
    return tuple(sorted(found.values()))


def configuration(kind: str, **changes) -> PretrainedConfig:
    """The tiny configuration of a model type."""
    config = fitting_config(AutoConfig.for_model(kind))
    return shrink(config, **CHANGES.get(kind, {}) | changes)


@cache
def directory(kind: str) -> Path:
    """A saved tiny model with a tokenizer."""
    folder = tiny.root / f"mixture-{kind}"
    config = configuration(kind)
    forms = classes_of(config)
    model = twin(config, getattr(transformers, forms.get("text-to-text") or forms["classification"]))
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@cache
def case(kind: str) -> "Case":
    """The tiny model of a type, made and loaded once."""
    family_of(configuration(kind))  # refused before anything is written
    return Case(kind)


class Case:
    """A tiny model of a type: its source, its parameters and a padded batch."""

    def __init__(self, kind: str):
        self.kind = kind
        forms = classes_of(configuration(kind))
        form = "text-to-text" if "text-to-text" in forms else "classification"
        self.source = ModelSource(str(directory(kind)), form)
        self.family = self.source.family
        labels = tiny.TASKS["animal"] if form == "classification" else ()
        self.labels, self.task = labels, "animal" if labels else ""
        self.params = self.source.load() | tiny.heads("animal", labels)
        ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        answers = torch.tensor([0, 2]) if labels else ids.masked_fill(mask == 0, -100)
        self.batch = {"input_ids": ids, "attention_mask": mask, "labels": answers}
        if self.source.config.is_encoder_decoder:
            self.batch["labels"] = answers[:, :4]

    def uneven(self) -> dict[str, tuple[int, ...]]:
        """Other experts, and another number of them, from layer to layer."""
        sets = ((1, 4, 6), (0, 2, 3, 5, 7), (2, 6))
        return {block: self.most(sets[i % 3], n) for i, (block, n) in enumerate(self.source.counts.items())}

    def even(self) -> dict[str, tuple[int, ...]]:
        """Other experts, but as many in every layer."""
        return {block: ((1, 4, 6), (0, 2, 5))[i % 2] for i, block in enumerate(self.source.counts)}

    def most(self, ids: tuple[int, ...], total: int) -> tuple[int, ...]:
        more = [i for i in ids if i < total]
        more += [i for i in range(total) if i not in more][: max(self.family.least - len(more), 0)]
        return tuple(sorted(more))

    def build(self, held=None):
        return self.source.build(self.params, self.task, self.labels, held).eval()

    def backbone(self):
        return getattr(transformers, self.family.classes[self.source.form]).from_pretrained(directory(self.kind)).eval()


def logits(model, batch):
    with torch.no_grad():
        return model(batch)[0]


def loss_of(model, batch):
    return F.cross_entropy(*model(batch))


def close(a, b, rtol=1e-4):
    torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=rtol * max(float(b.abs().max()), 1e-3))


# --- the checks -------------------------------------------------------------------------------------------------------


def keeping_all(case: Case) -> None:
    """All experts: the logits of transformers' own model, bit for bit."""
    model, own = case.build(all_experts(case.build())), case.backbone()
    batch = case.batch
    got = logits(model, batch)
    if case.labels:
        assert torch.equal(got, logits(case.build(), batch))
        return
    with torch.no_grad():
        if model.encoder_decoder:
            given = own.prepare_decoder_input_ids_from_labels(batch["labels"])
            out = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=given)
            expected = out.logits[batch["labels"] != -100]
        else:
            out = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            expected = out.logits[:, :-1][batch["labels"][:, 1:] != -100]
    close(got, expected, 1e-5)


def slice_and_mask(case: Case) -> None:
    """Every block: a slice is the block with its router masked; and a slice of the model is cut as it is built."""
    check_slices(case.backbone(), case.family, case.batch["input_ids"])
    held = case.uneven()
    built = case.build(held)
    for name, block in built.blocks().items():
        assert experts_in(block, case.family) == len(held[name])
    assert bool(logits(built, case.batch).isfinite().all())


def training(case: Case) -> None:
    """Uneven counts: a step lowers the loss, and the model on disk is the same to the bit."""
    held = case.uneven()
    model = case.build(held).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    model.eval()
    first = loss_of(model, case.batch)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, case.batch).backward()
        optimizer.step()
    model.eval()
    assert loss_of(model, case.batch).item() < first.item()
    before = flatten(case.build(held), held)
    moved = {key for key, t in flatten(model, held).items() if not torch.equal(t, before[key])}
    assert any(expert_of(key) for key in moved) and any(".router." in key for key in moved)
    with tempfile.TemporaryDirectory() as folder:
        save_sub_moe(Path(folder), case.source, model, held)
        _, again, ids = load_sub_moe(Path(folder))
        assert ids == held and torch.equal(logits(again.eval(), case.batch), logits(model, case.batch))


def names(case: Case) -> None:
    """Flat names of a slice say the ids of the full model, and lead back to the same tensors."""
    held = case.uneven()
    flat = flatten(case.build(held), held)
    assert all(tiny.same({key: flat[key]}, {key: case.params[key].to(flat[key].dtype)}) for key in flat)
    for block, ids in held.items():
        assert {expert_of(key)[1] for key in flat if (place := expert_of(key)) and place[0] == block} == set(ids)
    again = load_flat(case.build(held), {key: t + 1 if t.is_floating_point() else t for key, t in flat.items()}, held)
    for key, tensor in flatten(again, held).items():
        assert torch.equal(tensor, flat[key] + 1 if tensor.is_floating_point() else flat[key]), key


def usage(case: Case) -> None:
    """Counts leave out padding, count a recomputed forward pass once, and know experts that are not held."""
    model = case.build()
    seen: dict[str, torch.Tensor] = {}
    family = case.family
    hooks = [
        block.get_submodule(family.router).register_forward_hook(
            lambda m, a, out, name=name: seen.update({name: (out[family.routed], out[family.gates])})
        )
        for name, block in model.blocks().items()
    ]
    with Tap(model) as tap, tap.batch(case.batch, count=True):
        model(case.batch)
    for hook in hooks:
        hook.remove()
    for block, (routed, gates) in seen.items():
        side = "decoder" if block.startswith("decoder.") else "encoder"
        mask = model.masks(case.batch)[side].reshape(-1)
        if not family.dispatch:
            chosen = routed.reshape(len(mask), -1)[mask]
            total = case.source.counts[block]
            chosen = chosen[(gates.reshape(len(mask), -1)[mask] != 0) & (chosen < total)] if family.extra else chosen
            expected = torch.bincount(chosen.flatten(), minlength=total)
            assert torch.equal(tap.usage.served[block], expected)
        assert int(tap.usage.slots[block]) >= int(tap.usage.served[block].sum())
    again = case.build().train()
    plain, repeated = (_counted(again, case, checkpointing) for checkpointing in (False, True))
    assert all(torch.equal(plain.demand[block], repeated.demand[block]) for block in plain.demand)
    held = case.uneven()
    part = case.build(held)
    outside = {k: t for k, t in case.params.items() if ".router." in k}
    with Tap(part, held, outside, case.source.counts) as tap2, tap2.batch(case.batch, count=True):
        part(case.batch)
    first = next(iter(held))  # the only one that is given the same in both
    assert torch.equal(tap2.usage.demand[first], tap.usage.demand[first])


def _counted(model, case, checkpointing):
    if checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    with Tap(model) as tap, torch.random.fork_rng():
        torch.manual_seed(0)
        with tap.batch(case.batch, count=True):
            loss = loss_of(model, case.batch)
        loss.backward()
    return tap.usage


def generation(case: Case) -> None:
    """The full model writes what transformers' own writes; a slice writes, too."""
    if case.labels:
        return
    batch = {key: case.batch[key][1:, :5] for key in ("input_ids", "attention_mask")}
    own = case.backbone()
    with torch.no_grad():
        expected = own.generate(**batch, max_new_tokens=4, do_sample=False, num_beams=1)
    expected = expected[:, 1:] if own.config.is_encoder_decoder else expected[:, 5:]
    assert torch.equal(case.build().generate(batch, 4), expected)
    assert case.build(case.uneven()).generate(batch, 4).shape[1] >= 1


def adapters(case: Case) -> None:
    """Adapters on experts are the model with their product added to the weights."""
    lora = Lora(rank=2, alpha=4)
    held = case.uneven()
    model = add_lora(case.build(held), lora)
    rng = torch.Generator().manual_seed(3)
    for name, tensor in model.adapters.named().items():
        if name.endswith(".lora_B"):
            tensor.data.copy_(torch.randn(tensor.shape, generator=rng) * 0.1)
    skeleton = case.source.skeleton(case.task, case.labels)
    base = flatten(case.build(held), held)
    whole = merged(skeleton, base, flatten(model, held), lora)
    plain = case.source.build(whole, case.task, case.labels, held).eval()
    got, expected = logits(model.eval(), case.batch), logits(plain, case.batch)
    close(got, expected)
    assert not torch.equal(got, logits(case.build(held), case.batch))


def export(case: Case) -> None:
    """As many experts in every layer: plain transformers loads what is saved, and computes the same."""
    held = {block: case.most(ids, 8) for block, ids in case.even().items()}
    model = fold_gates(case.build(held))
    expected = logits(model, case.batch)
    config, _ = uniform(model)
    model.backbone.config = config
    cls = type(model.backbone)
    with tempfile.TemporaryDirectory() as folder:
        model.backbone.save_pretrained(folder)
        plain, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    again = case.build(held)
    again.backbone = plain.eval()
    close(logits(again, case.batch), expected)


def restricted(case: Case) -> None:
    """HFedMoE's backward pass through some experts: theirs are the gradients of the full pass, others have none."""
    last = list(case.source.counts)[-1]
    counting = case.build()
    with Tap(counting) as tap, tap.batch(case.batch, count=True):
        counting(case.batch)
    keep = tuple(tap.usage.served[last].argsort(descending=True)[:3].tolist())  # so that tokens reach them
    gradients = []
    for active in (None, {last: keep}):
        model = case.build()
        experts = Experts(model)
        with experts:
            loss = loss_of(model, case.batch)
            experts.active = active
            loss.backward()
        gradients.append({name: leaf.grad for name, leaf in experts.leaves.items()})
    full, part = gradients
    reached = 0
    for name, gradient in part.items():
        block, place = expert_of(name)
        if block == last and place in keep:
            assert (gradient is None) == (full[name] is None)
            if gradient is not None:
                close(gradient, full[name])
                reached += 1
        else:
            assert gradient is None
    assert reached


def memory(case: Case) -> None:
    """What a training step saves for its backward pass is below what is promised."""
    target = case.batch["labels"].shape[1] if case.source.config.is_encoder_decoder else 0
    promised = MemoryModel.of(case.source).footprint(
        case.source.counts, mode="full", batch_size=2, max_length=9, target_length=target, optimizer="adamw"
    )
    model = case.build().train()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, case.batch)
    assert 0 < sum(held.values()) <= promised.activations
    assert promised.weights >= sum(p.numel() * 4 for p in model.backbone.parameters())
    del loss


def federated(case: Case, algorithm, memory: int) -> None:
    """Two rounds of two clients, one with memory for a part of the experts: both train within it, and are scored."""
    source = case.source
    bytes_of = {"animal-00": tiny.bytes_for(8, source, 1), "animal-01": memory}
    infos = tuple(info for info in tiny.infos(bytes_of) if info.id in bytes_of)
    setup = tiny.setup(source, clients=infos)
    server, client = algorithm.server(setup), algorithm.client(setup)
    before = {key: tensor.clone() for key, tensor in server.params.items()}
    with tempfile.TemporaryDirectory() as folder:
        engine = tiny.engine(server, client, setup, Path(folder), strict=True)
        engine.round(1, test=False)
        record = engine.round(2, test=True)
    for info in infos:
        told = record["clients"][info.id]
        assert told["rejected"] is None and math.isfinite(told["train_loss"])
        assert 0 < told["peak_bytes_model"] <= info.memory_bytes
    assert set(record["test"]) == set(bytes_of)
    some = setup.footprint(source.counts, trained=case.family.least * len(source.counts)).total > memory
    assert not some or sum(counts_of(server.structure()["animal-01"]).values()) < sum(source.counts.values())
    moved = {key for key, tensor in server.params.items() if not torch.equal(tensor, before[key])}
    assert any(expert_of(key) for key in moved) and any(".router." in key for key in moved)
    assert not any(case.family.correction and key.endswith(case.family.correction) for key in moved)


def fedmoe(case: Case) -> None:
    """FedMoE; see `federated`."""
    federated(case, FedMoE(stage1="forward", alpha=1.0), tiny.bytes_for(3, case.source))


def hfedmoe(case: Case) -> None:
    """HFedMoE: a device holds three experts per layer, and trains as few in a batch as the router needs."""
    least = case.family.least * len(case.source.counts)
    setup = tiny.setup(case.source)
    three, few = dict.fromkeys(case.source.counts, 3), dict.fromkeys(case.source.counts, case.family.least)
    memory = setup.footprint(three, trained=least).total
    try:
        setup.budgets(ClientInfo("device", 1, "animal", memory))
    except BudgetError:  # of few experts all are trained, which may need more than of three one by one
        memory = max(memory, setup.footprint(few, trained=least).total)
    federated(case, HFedMoE(), memory)


CHECKS = {
    "keeping all": keeping_all,
    "slice and mask": slice_and_mask,
    "training and files": training,
    "names": names,
    "usage": usage,
    "generation": generation,
    "adapters": adapters,
    "export": export,
    "restricted backward": restricted,
    "memory": memory,
    "FedMoE": fedmoe,
    "HFedMoE": hfedmoe,
}
"""What every mixture is checked for."""


def results(kind: str) -> dict[str, str]:
    """Return check -> "" if it passes, or what it says; {"refused": reason} for a type that is refused."""
    try:
        made = case(kind)
    except ModelError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"refused": f"its tiny configuration cannot be made: {first_line(error)}"}
    found = {}
    for name, check in CHECKS.items():
        try:
            torch.manual_seed(0)
            check(made)
            found[name] = ""
        except (Exception, ConsiliumError) as error:
            found[name] = f"{type(error).__name__}: {first_line(error)}"[:300]
    return found


INTRODUCTION = """# Families of models

Every mixture of experts of transformers {version} with a text class, as a tiny model with random weights, and what it
passes. A model's structure is found from its configuration (`moe/discovery.py`), a row of `moe/families.py` states only
what cannot be found, and a model that does not behave as found is refused by name. `python tests/mixtures.py` runs all
checks and writes this page; `pytest -m families` compares it with what passes.

Hybrid models are cut in their mixtures alone: their state space, linear attention and convolution layers stay whole.

| check | what it shows |
|---|---|
"""


def read_page() -> dict[str, dict[str, str]]:
    """Return what the page says of each type, in the form of `results`."""
    told: dict[str, dict[str, str]] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == len(CHECKS) + 1:
            told[cells[0].strip("`")] = {
                name: "" if cell == "yes" else "no" for name, cell in zip(CHECKS, cells[1:], strict=True)
            }
        elif line.startswith("| `") and len(cells) == 2 and cells[0].strip("`") in types():
            told[cells[0].strip("`")] = {"refused": cells[1]}
    return told


def said(found: dict[str, str]) -> dict[str, str]:
    """Return results without what failing checks say, which is not the page's to hold exactly."""
    return {name: text if name == "refused" else "no" if text else "" for name, text in found.items()}


def write_page(told: dict[str, dict[str, str]]) -> None:
    """Write docs/families.md."""
    lines = [INTRODUCTION.format(version=transformers.__version__).rstrip()]
    lines += [f"| {name} | {(check.__doc__ or '').strip().splitlines()[0]} |" for name, check in CHECKS.items()]
    passing = {kind: found for kind, found in sorted(told.items()) if "refused" not in found}
    whole = [kind for kind, found in passing.items() if not any(found.values())]
    lines += ["", f"## {len(whole)} of {len(told)} pass everything", ""]
    lines += ["| model type | " + " | ".join(CHECKS) + " |", "|---" * (len(CHECKS) + 1) + "|"]
    for kind, found in passing.items():
        lines.append(f"| `{kind}` | " + " | ".join("no" if found[name] else "yes" for name in CHECKS) + " |")
    failing = [(kind, name, text) for kind, found in passing.items() for name, text in found.items() if text]
    if failing:
        lines += ["", "What does not pass, and what it says:", ""]
        lines += [f"- {kind}, {name}: {text}" for kind, name, text in failing]
    lines += ["", "## Refused", "", "| model type | why |", "|---|---|"]
    lines += [f"| `{kind}` | {found['refused']} |" for kind, found in sorted(told.items()) if "refused" in found]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    told = read_page() if PAGE.exists() else {}
    log = Path(os.environ.get("MIXTURES_LOG", os.devnull))
    with tempfile.TemporaryDirectory() as place:
        tiny.root = Path(place)
        for kind in sys.argv[1:] or types():
            start = time.monotonic()
            told[kind] = results(kind)
            print(kind, json.dumps(told[kind]), f"{time.monotonic() - start:.1f}s", flush=True)
            with log.open("a") as out:
                out.write(json.dumps({kind: told[kind]}) + "\n")
            case.cache_clear()
    write_page(told)
