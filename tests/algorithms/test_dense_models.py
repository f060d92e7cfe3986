"""Dense causal language models: adapters on their linear layers, and the methods that need no experts."""

import json
import math
from functools import cache

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.fedprox import FedProx
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.algorithms.standalone import Standalone
from consilium.errors import ConfigError
from consilium.experiment import Experiment
from consilium.moe.adapter_files import load_adapters, save_adapters
from consilium.moe.addressing import flatten, is_adapter, travels
from consilium.moe.build import ModelSource
from consilium.moe.lora import Lora, add_lora, initial_adapters, merged
from consilium.moe.twin import shrink

TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "smollm3", "olmo2", "granite", "cohere2")
METHODS = {
    "FedAvg": FedAvg,
    "FedProx": lambda: FedProx(mu=0.1),
    "SCAFFOLD": SCAFFOLD,
    "Standalone": Standalone,
}


@cache
def source(kind: str, form: str = "text-to-text") -> ModelSource:
    folder = tiny.root / f"dense-{kind}"
    if not folder.exists():
        config = shrink(AutoConfig.for_model(kind))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    return ModelSource(str(folder), form)


def adapted(kind: str, lora: Lora, form: str = "text-to-text"):
    """A model with adapters that change something."""
    made = source(kind, form)
    model = add_lora(made.build(made.load(), "", ()), lora).eval()
    rng = torch.Generator().manual_seed(0)
    for name, tensor in model.adapters.named().items():
        if name.endswith(".lora_B"):
            tensor.data.copy_(torch.randn(tensor.shape, generator=rng) * 0.1)
    return made, model


@pytest.mark.parametrize("kind", TYPES)
def test_logits_and_adapters(kind):
    """The logits are transformers' own; adapters are the model with B A added; both forms are known to the memory."""
    made, model = adapted(kind, Lora(2, 4))
    plain = made.build(made.load(), "", ()).eval()
    batch = tiny.batch(made)
    own = AutoModelForCausalLM.from_pretrained(made.path).eval()
    with torch.no_grad():
        got, _ = plain(batch)
        expected = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = expected[:, :-1][batch["labels"][:, 1:] != -100]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        whole = merged(made.skeleton("", ()), made.load(), flatten(model), Lora(2, 4))
        changed, _ = made.build(whole, "", ()).eval()(batch)
        torch.testing.assert_close(model(batch)[0], changed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, got, atol=1e-3)
    assert all(travels(key) and is_adapter(key) for key in flatten(model))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("name", METHODS)
def test_two_rounds_of_adapters(name, kind, tmp_path):
    made = tiny.setup(source(kind), clients_per_round=3, clients=tiny.infos(), lora=Lora(rank=2))
    algorithm = METHODS[name]()
    server, client = algorithm.server(made), algorithm.client(made)
    engine = tiny.engine(server, client, made, tmp_path, strict=True)
    before = {key: tensor.clone() for key, tensor in server.params.items()}
    records = [engine.round(number, test=number == 2) for number in (1, 2)]
    for told in records[1]["clients"].values():
        assert told["rejected"] is None and math.isfinite(told["train_loss"])
        assert told["peak_bytes_model"] > 0
    assert all(travels(key) for key in server.params)
    moved = [key for key in before if not torch.equal(server.params[key], before[key])]
    assert bool(moved) == (name != "Standalone")


def test_fewer_targets_and_a_short_memory():
    made = source("llama")
    skeleton = made.skeleton("", ())
    few = initial_adapters(skeleton, Lora(2, targets=("q_proj", "v_proj")), 0)
    assert {key.split(".")[-2] for key in few} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"lora.targets has 'wi'; llama has q_proj, k_proj, v_proj, o_proj"):
        initial_adapters(skeleton, Lora(2, targets=("wi",)), 0)
    with pytest.raises(ConfigError, match=r"'nf4', which stores experts in 4 bits; a dense model has none"):
        add_lora(made.build(made.load(), "", ()), Lora(2, base="nf4"))
    setup = tiny.setup(made, lora=Lora(2))
    assert setup.footprint({}).total < tiny.setup(made).footprint({}).total
    assert "MB" in setup.lacks(tiny.infos({"animal-00": 1000})[0], {})


def test_peft_reads_the_adapters(tmp_path):
    """The same logits from PEFT on the base; and read back by ours."""
    from peft import PeftModel

    made, model = adapted("llama", Lora(2, 4))
    save_adapters(model, tmp_path, made.path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(told["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.path), tmp_path).eval()
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, model.backbone(input_ids=ids).logits)
    again = load_adapters(made.build(made.load(), "", ()).eval(), tmp_path)
    assert tiny.same(flatten(again), flatten(model))


def test_methods_that_need_experts_say_so():
    made = source("llama")
    with pytest.raises(ConfigError, match=r"FedMoE cannot train .*dense-llama: it needs a mixture of experts"):
        Experiment("x", data=tiny_data(), model=made, algorithm=FedMoE())
    with pytest.raises(ConfigError, match=r"experts is 3, but .* has no experts; leave it at 'all'"):
        FedAvg(experts=3).server(tiny.setup(made))


def tiny_data():
    from consilium.data.language import LanguageData

    return LanguageData(path="texts.jsonl", text="text")
