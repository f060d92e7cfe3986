"""Upcycling: with equal copies the dense model's logits, in plain transformers; what no family holds is refused."""

import json
from functools import cache

import pytest
import runs
import tiny
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from consilium.__main__ import main
from consilium.errors import ConfigError, ModelError
from consilium.fit import Fit
from consilium.loop import run
from consilium.moe.build import ModelSource
from consilium.moe.upcycle import Upcycling, upcycle

DENSE = {
    "llama": {},
    "mistral": dict(sliding_window=4, head_dim=8),
    "llama-biased": dict(attention_bias=True),
    "granite": dict(attention_multiplier=0.3, logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen2-sliding": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": dict(head_dim=8, attention_bias=True),
    "olmo2": dict(),
    "t5": {},
}
MADE = {
    "llama": "mixtral", "mistral": "mixtral", "llama-biased": "granitemoe", "granite": "granitemoe",
    "qwen2": "qwen2_moe", "qwen2-sliding": "qwen2_moe", "qwen3": "qwen3_moe",
    "olmo2": "flex_olmo", "t5": "switch_transformers",
}  # fmt: skip
EXACT = [name for name in DENSE if name != "t5"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def configuration(name, **changes):
    if name == "t5":
        settings = dict(vocab_size=tiny.VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2)
        return AutoConfig.for_model("t5", **settings | dict(decoder_start_token_id=0) | changes)
    settings = dict(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    return AutoConfig.for_model(name.split("-")[0], **settings | DENSE[name] | changes)


def saved(folder, name, dtype=torch.float32, **changes):
    """A dense model with random weights, biases among them, its tokenizer and a chat template."""
    config = configuration(name, **changes)
    cls = transformers.T5ForConditionalGeneration if name == "t5" else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config) if name == "t5" else cls.from_config(config)
        for key, tensor in model.named_parameters():
            if key.endswith(".bias"):
                tensor.data.normal_()
    model.to(dtype).save_pretrained(folder)
    tokenizer = tiny.tokenizer().__class__(tokenizer_object=tiny.tokenizer().backend_tokenizer, pad_token="<pad>")
    tokenizer.eos_token, tokenizer.chat_template = "</s>", TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@cache
def dense(name):
    return saved(tiny.root / f"dense-{name}", name)


@cache
def made(name, **how):
    """A dense model upcycled."""
    folder = tiny.root / f"made-{name}-{len(how)}"
    folder.mkdir()
    upcycle(str(dense(name)), folder, Upcycling(**how))
    return folder


def logits(folder, name):
    cls = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    model = cls.from_pretrained(folder).eval()
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    given = {"decoder_input_ids": ids[:, :4]} if name == "t5" else {}
    with torch.no_grad():
        return model(input_ids=ids, **given).logits


@pytest.mark.parametrize("name", EXACT)
def test_equal_copies_give_the_dense_models_logits(name):
    """In plain transformers, to 1e-5; 8 experts, top-2, weights of the chosen that sum to 1."""
    torch.testing.assert_close(logits(made(name), name), logits(dense(name), name), atol=1e-5, rtol=1e-5)
    config = json.loads((made(name) / "config.json").read_text())
    assert config["model_type"] == MADE[name] and config["num_experts_per_tok"] == 2


@pytest.mark.parametrize("name", EXACT)
def test_other_numbers_and_half_of_the_layers(name, tmp_path):
    """Five experts, top-3; where a family has dense layers, the first stays one."""
    every = 2 if name.startswith("qwen") else 1
    upcycle(str(dense(name)), tmp_path, Upcycling(experts=5, top_k=3, every=every))
    torch.testing.assert_close(logits(tmp_path, name), logits(dense(name), name), atol=1e-5, rtol=1e-5)
    counts = ModelSource(str(tmp_path)).counts
    assert list(counts.values()) == [5] * (2 // every)
    assert all("layers.1." in block for block in counts) or every == 1


def test_switch_is_near_and_the_nearer_the_smaller_its_routers(tmp_path):
    """Probabilities are about 1/E, and E times the second matrix makes up for it."""
    exact, apart = logits(dense("t5"), "t5"), []
    for std in (1e-1, 1e-3, 1e-6):
        folder = tmp_path / str(std)
        folder.mkdir()
        upcycle(str(dense("t5")), folder, Upcycling(router_std=std))
        apart.append((logits(folder, "t5") - exact).abs().max().item() / exact.abs().max().item())
    assert apart[0] > 10 * apart[1] and apart[1] < 0.01 and apart[2] < 1e-5
    source = ModelSource(str(folder), "text-to-text")  # a slice weighs its one of three copies as the whole does
    assert set(source.gate_scales(dict.fromkeys(source.counts, (0, 1, 2))).values()) == {3 / 8}
    (tmp_path / "plain").mkdir()
    upcycle(str(dense("t5")), tmp_path / "plain", Upcycling(scale=False))
    assert (logits(tmp_path / "plain", "t5") - exact).abs().max() > 0.01 * exact.abs().max()
    counts = ModelSource(str(tmp_path / "plain"), "text-to-text").counts
    assert list(counts.values()) == [8, 8] and all(".block.1." in block for block in counts)


def test_copies_with_noise_differ_from_one_another(tmp_path):
    """The deviation from the dense matrix is the share asked for; the same seed gives the same weights."""
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / folder).mkdir()
        upcycle(str(dense("llama")), tmp_path / folder, Upcycling(noise=0.5, seed=seed))
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in "abc"]
    down = models[0].model.layers[0].mlp.experts.down_proj
    own = transformers.AutoModelForCausalLM.from_pretrained(dense("llama")).model.layers[0].mlp.down_proj.weight
    assert ((down - own).std() / own.std()).item() == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(down[0], down[1])
    states = [model.state_dict() for model in models]
    assert all(torch.equal(t, states[1][key]) for key, t in states[0].items())
    assert any(not torch.equal(t, states[2][key]) for key, t in states[0].items())


def test_tokenizer_template_and_dtype_are_taken_along(tmp_path):
    saved(tmp_path / "dense", "llama", torch.bfloat16)
    (tmp_path / "made").mkdir()
    upcycle(str(tmp_path / "dense"), tmp_path / "made", Upcycling())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "dense").get_vocab()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi\n"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_what_the_dense_class_does_not_know_is_no_hindrance(tmp_path):
    """t5-small's configuration says output_past, which no class reads."""
    saved(tmp_path / "dense", "t5")
    told = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(told | {"output_past": True, "n_positions": 512}))
    (tmp_path / "made").mkdir()
    assert "t5 as Switch Transformers" in upcycle(str(tmp_path / "dense"), tmp_path / "made", Upcycling())[0]


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "t5"])
def test_it_trains_a_round_of_fedmoe(name, tmp_path):
    experiment = runs.experiment(
        runs.table(tmp_path, clients=2), "FedMoE", model=ModelSource(str(made(name))), rounds=1, fit=Fit(batch_size=8)
    )
    summary = run(experiment, tmp_path / "run")
    assert summary["coverage"] == "2/2" and 0 <= summary["mean"] <= 1


def test_the_command(tmp_path, capsys):
    out = tmp_path / "made"
    assert main(["upcycle", str(dense("mistral")), "--experts", "4", "--top-k", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "mistral as Mixtral, 4 experts in 2 layers, top-1" in said and "balance loss alone" in said
    assert main(["inspect", str(out)]) == 0 and "Mixtral" in capsys.readouterr().out
    assert main(["upcycle", str(dense("mistral")), "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["upcycle", str(tiny.directory("olmoe")), "--out", str(tmp_path / "x")]) == 2
    assert "is a mixture of experts already" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"mlp_bias": True}, "says mlp_bias = True, for which Mixtral has no place"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sliding_attention"),
        ("t5", {"feed_forward_proj": "gated-gelu"}, r"are gated \(as in T5 1.1\)"),
        ("mistral", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantised"),
    ],
)
def test_what_no_family_holds(name, changes, message, tmp_path):
    saved(tmp_path / "dense", name, **{k: v for k, v in changes.items() if k != "quantization_config"})
    told = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(told | changes | {"output_past": True}))
    with pytest.raises(ModelError, match=message):
        upcycle(str(tmp_path / "dense"), tmp_path / "made", Upcycling())
    assert not (tmp_path / "made").exists()


def test_other_models_and_missing_weights(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'bert' fits no family here; dense models that do: llama, mistral"):
        upcycle(str(tmp_path), tmp_path / "made", Upcycling())
    folder = saved(tmp_path / "short", "llama")
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"lacks 1 weights, e.g. 'lm_head.weight'"):
        upcycle(str(folder), tmp_path / "made", Upcycling())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("t5", {"top_k": 2}, "top_k is 2, but Switch Transformers takes one expert"),
        ("t5", {"every": 3}, "every is 3; it must divide num_layers, which is 2"),
        ("llama", {"every": 2}, "all layers of Mixtral are sparse"),
    ],
)
def test_settings_that_a_family_does_not_have(name, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        upcycle(str(dense(name)), tmp_path, Upcycling(**options))


@pytest.mark.parametrize("options", [{"experts": 1}, {"top_k": 9}, {"every": 0}, {"noise": -1.0}, {"router_std": 0.0}])
def test_refused(options):
    with pytest.raises(ConfigError, match=r" is .*; it must be"):
        Upcycling(**options)


def other(folder, name, seed):
    """A dense model of the same configuration with other weights."""
    saved(folder, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rng = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        tensor.data += torch.randn(tensor.shape, generator=rng) * 0.1
    model.save_pretrained(folder)
    return model.state_dict()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_branches_are_mixed(name, tmp_path):
    """Branch-Train-MiX: experts of the models in turn, and the mean of what is no feed-forward network."""
    states = [other(tmp_path / part, name, i) for i, part in enumerate("abc")]
    paths = tuple(str(tmp_path / part) for part in "bc")
    told = upcycle(str(tmp_path / "a"), tmp_path / "mixed", Upcycling(experts=4, branches=paths))
    assert told[0].startswith(f"{tmp_path / 'a'} + {tmp_path / 'b'} + ")
    params = ModelSource(str(tmp_path / "mixed"), "text-to-text").load()
    for layer in range(2):
        for i in range(4):
            mlp = f"model.layers.{layer}.mlp"
            state = states[i % 3]
            gate_up = torch.cat([state[f"{mlp}.gate_proj.weight"], state[f"{mlp}.up_proj.weight"]])
            assert torch.equal(params[f"{mlp}.experts.{i}.gate_up_proj"], gate_up)
            assert torch.equal(params[f"{mlp}.experts.{i}.down_proj"], state[f"{mlp}.down_proj.weight"])
    for key in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        torch.testing.assert_close(params[key], (states[0][key] + states[1][key] + states[2][key]) / 3)


def test_branches_must_fit(tmp_path):
    for part, name in (("a", "llama"), ("b", "qwen3")):
        saved(tmp_path / part, name)
    saved(tmp_path / "c", "llama", hidden_size=32)
    with pytest.raises(ModelError, match=r"branch .*b' is a qwen3, and .*a' a llama"):
        upcycle(str(tmp_path / "a"), tmp_path / "x", Upcycling(branches=(str(tmp_path / "b"),)))
    with pytest.raises(ModelError, match=r"differ in .*: give models of one configuration"):
        upcycle(str(tmp_path / "a"), tmp_path / "x", Upcycling(branches=(str(tmp_path / "c"),)))
    with pytest.raises(ConfigError, match=r"branches has 2 models, .*: experts is 2; it must be at least as many"):
        Upcycling(experts=2, branches=("b", "c"))
