"""Adapters as PEFT's files: what we write PEFT loads unchanged and computes alike, and the other way round."""

import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from consilium.errors import ModelError
from consilium.moe.adapter_files import load_adapters, save_adapters
from consilium.moe.lora import Lora, add_lora
from consilium.moe.surgery import slice_experts

FAMILIES = ("olmoe", "mixtral", "switch_transformers", "gpt_oss")
LORA = Lora(rank=2, alpha=3.0)


def live(model_type, form="text-to-text"):
    source = tiny.source(model_type, form)
    return source.build(source.load(), "animal", ()).eval(), tiny.batch(source)


def randomised(parameters):
    rng = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data.normal_(std=0.2, generator=rng)


def in_peft(model, folder=None, config=None):
    """The backbone as a PeftModel: loaded from a folder, or new."""
    from peft import PeftModel, get_peft_model

    model_type, model.config.model_type = model.config.model_type, "custom"  # see lora.add_expert_lora
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model.backbone, config) if folder is None else PeftModel.from_pretrained(
            model.backbone, folder
        )  # fmt: skip
    model.config.model_type = model_type
    return wrapped


def logits(model, batch):
    with torch.no_grad():
        return model(batch)[0]


@pytest.mark.parametrize("lora", [LORA, Lora(rank=3, targets=("down_proj",))], ids=["all", "one"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_peft_loads_what_we_write(model_type, lora, tmp_path):
    if lora.targets and model_type == "switch_transformers":
        lora = Lora(rank=3, targets=("wo",))
    model, batch = live(model_type)
    plain = logits(model, batch)
    add_lora(model, lora)
    randomised(model.adapters.parameters())
    save_adapters(model, tmp_path)
    other, _ = live(model_type)
    wrapped = in_peft(other, tmp_path)
    adapted = logits(model, batch)
    torch.testing.assert_close(logits(other, batch), adapted, rtol=1e-5, atol=1e-5)
    assert (adapted - plain).abs().max() > 0.1
    wrapped.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert tiny.same(ours, theirs)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_we_load_what_peft_writes(model_type, tmp_path):
    from peft import LoraConfig

    from consilium.moe.lora import peft_targets

    model, batch = live(model_type)
    targets = peft_targets(model, model.family.lora_targets)
    wrapped = in_peft(model, config=LoraConfig(r=2, lora_alpha=5, **targets))
    randomised(p for n, p in wrapped.named_parameters() if "lora_" in n)
    wrapped.save_pretrained(tmp_path)
    other, _ = live(model_type)
    load_adapters(other, tmp_path)
    assert other.adapters.scale == 2.5
    torch.testing.assert_close(logits(other, batch), logits(model, batch), rtol=1e-5, atol=1e-5)


def test_a_slice_is_written_and_read(tmp_path):
    """Uneven counts: every block's file tensors have its own number of experts."""
    models = []
    for _ in range(2):
        model, batch = live("olmoe")
        first, last = model.blocks()
        models.append(slice_experts(model, {first: (0, 2, 5), last: (1, 3)}))
    add_lora(models[0], LORA)
    randomised(models[0].adapters.parameters())
    save_adapters(models[0], tmp_path)
    load_adapters(models[1], tmp_path)
    torch.testing.assert_close(logits(models[1], batch), logits(models[0], batch), rtol=0, atol=0)


def test_what_is_not_ours_to_read_is_refused(tmp_path):
    model, _ = live("olmoe")
    add_lora(model, LORA)
    save_adapters(model, tmp_path)
    config, file = (tmp_path / "adapter_config.json").read_text(), tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.ones(1)}, file)
    with pytest.raises(ModelError, match="more than experts"):
        load_adapters(live("olmoe")[0], tmp_path)
    key = next(iter(tensors))
    save_file({k: t for k, t in tensors.items() if k != key}, file)
    with pytest.raises(ModelError, match="does not fit the model"):
        load_adapters(live("olmoe")[0], tmp_path)
    (tmp_path / "adapter_config.json").write_text(config.replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(ModelError, match="not plain LoRA"):
        load_adapters(live("olmoe")[0], tmp_path)
