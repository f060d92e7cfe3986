"""ModelSource: what it builds equals what transformers loads; and its errors, one line each."""

import json
import shutil

import pytest
import tiny
import torch
import transformers

from consilium.errors import ModelError
from consilium.moe.addressing import flatten
from consilium.moe.build import ModelSource, shipped

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 1], [10, 11, 12, 1, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_the_built_model_is_transformers_own(model_type, form, dtype):
    """Same bits out as `from_pretrained`: buffers, ties and dtypes are as they should be.

    The reference's weights are copied first: transformers maps them from the file at whatever address they have there,
    and the last bits of a matrix product depend on the alignment.
    """
    source = tiny.source(model_type, form, dtype)
    cls = getattr(transformers, tiny.FAMILIES[model_type].classes[form])
    reference = cls.from_pretrained(source.location, dtype=source.torch_dtype).eval()
    for parameter in reference.parameters():
        parameter.data = parameter.data.clone()
    model = source.build(source.load(), "t", ()).eval()
    inputs = dict(BATCH)
    if form == "text-to-text" and model.encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 7, 8], [0, 9, 1]])
    with torch.inference_mode():
        expected, actual = reference(**inputs)[0], model.backbone(**inputs)[0]
    assert expected.dtype == actual.dtype and torch.equal(expected, actual)
    for name, buffer in reference.named_buffers():
        assert torch.equal(buffer, model.backbone.get_buffer(name))


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_counts_need_no_weights(model_type, form):
    source = tiny.source(model_type, form)
    assert set(source.counts.values()) == {8}
    assert all(p.is_meta for p in source.skeleton("t", ()).backbone.parameters())
    assert list(source.counts) == list(source.build(source.load(), "t", ()).blocks())


def test_blocks_come_in_the_order_of_the_layers():
    """Not in the order of their names, where block 11 comes before block 3."""
    counts = tiny.source(num_layers=12, num_sparse_encoder_layers=6).counts
    assert list(counts) == [f"encoder.block.{i}.layer.1.mlp" for i in (1, 3, 5, 7, 9, 11)]


def test_an_encoder_decoder_checkpoint_serves_classification():
    folder = tiny.directory("switch_transformers", "text-to-text")
    params = ModelSource(str(folder)).load()
    assert not any(key.startswith("decoder.") for key in params)
    assert params.keys() == tiny.source().load().keys()


def test_an_encoder_only_checkpoint_is_refused_for_text_to_text():
    with pytest.raises(ModelError, match=r"no weights for text-to-text: .* are missing, e.g. 'decoder"):
        ModelSource(str(tiny.directory("switch_transformers")), "text-to-text").load()


def test_loading_leaves_the_progress_bars_and_the_log_level_as_they_were(capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    tiny.source().load()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_the_card_tells_public_usage(tmp_path):
    shutil.copytree(tiny.directory("switch_transformers"), tmp_path / "m")
    assert ModelSource(str(tmp_path / "m")).public_usage() == {}
    usage = {"encoder.block.0.layer.1.mlp": [0.125] * 8}
    (tmp_path / "m" / "card.json").write_text(json.dumps({"usage_public": usage}))
    assert ModelSource(str(tmp_path / "m")).public_usage() == usage


def test_a_tokenizer_without_padding_pads_with_its_end_mark(tmp_path):
    shutil.copytree(tiny.directory("switch_transformers"), tmp_path / "m")
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer().backend_tokenizer, eos_token="</s>")
    bare.save_pretrained(tmp_path / "m")
    tiny.configuration("switch_transformers", pad_token_id=None).save_pretrained(tmp_path / "m")
    assert ModelSource(str(tmp_path / "m")).tokenizer().pad_token == "</s>"


# --- errors -----------------------------------------------------------------------------------------------------------


def fails(source: ModelSource, what: str = "config") -> str:
    """The message of the ModelError; it must be one line."""
    with pytest.raises(ModelError) as caught:
        value = getattr(source, what)
        if callable(value):
            value()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "~/no such model", "model", "a/b/c"])
def test_a_missing_directory_says_so(path):
    message = fails(ModelSource(path))
    assert repr(path) in message and "neither a directory, a shipped model" in message and "owner/name" in message


def test_a_directory_without_a_model_says_so(tmp_path):
    assert "has no config.json" in fails(ModelSource(str(tmp_path)))


def test_a_hub_name_that_cannot_be_reached():
    message = fails(ModelSource("nobody/such-model"))
    assert message.startswith("model 'nobody/such-model' cannot be read: ")


@pytest.mark.parametrize(
    ("config", "says"),
    [('{"model_type": "bert"}', "model type 'bert' is neither a mixture of experts"),
     ('{"model_type": "made-up"}', "cannot be read"), ("{}", "cannot be read"), ("not json", "cannot be read")],
)  # fmt: skip
def test_an_unknown_model_type(tmp_path, config, says):
    (tmp_path / "config.json").write_text(config)
    assert says in fails(ModelSource(str(tmp_path)), "family")


def test_a_directory_without_weights(tmp_path):
    tiny.configuration("olmoe").save_pretrained(tmp_path)
    assert "cannot be loaded" in fails(ModelSource(str(tmp_path)), "load")


def test_weights_that_are_not_safetensors_are_not_read(tmp_path):
    """A pickle in the directory is left alone, with an error, even where it is the only file with weights."""
    tiny.configuration("olmoe").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "cannot be loaded" in fails(ModelSource(str(tmp_path)), "load")


def test_a_directory_without_a_tokenizer(tmp_path):
    tiny.configuration("olmoe").save_pretrained(tmp_path)
    assert "has no tokenizer" in fails(ModelSource(str(tmp_path)), "tokenizer")


def test_shipped_models_can_be_read():
    """Those that come with the package, if there are any in this checkout."""
    for name in shipped():
        source = ModelSource(name)
        assert source.counts
        assert flatten(source.build(source.load(), "t", ())).keys() == source.load().keys()


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3"])
def test_rounding_leaves_a_correction_bias_as_it_is(model_type):
    source = tiny.source(model_type, dtype="bfloat16")
    rounded = source.round({key: t.float() for key, t in source.load().items()})
    assert tiny.same(rounded, source.load())
    exact = {key for key, t in rounded.items() if t.dtype == torch.float32}
    assert {key.rsplit(".", 1)[-1] for key in exact} == ({"e_score_correction_bias"} if "v3" in model_type else set())
