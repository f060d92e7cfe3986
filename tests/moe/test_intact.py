"""A model's folder is looked at before anything of it is used, and what is wrong is said in words of the user's."""

import json
import shutil

import pytest
import tiny
import torch
import transformers

from consilium.errors import ConfigError, ModelError
from consilium.moe.addressing import flatten
from consilium.moe.build import ModelSource

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 244104\n"


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny decoder, to be damaged."""
    return shutil.copytree(tiny.directory("olmoe", "text-to-text"), tmp_path / "m")


def source(folder, **changes) -> ModelSource:
    return ModelSource(str(folder), "text-to-text", **changes)


@pytest.mark.parametrize(
    ("name", "what"), [("model.safetensors", "load"), ("tokenizer.json", "tokenizer"), ("config.json", "config")]
)
def test_pointers_of_git_lfs_and_git_annex(folder, name, what):
    """What a clone without their tools leaves in place of a file."""
    for content, says in (
        (POINTER, rf"{name} is a Git LFS pointer of {len(POINTER)} bytes: run git lfs pull$"),
        ("/annex/objects/SHA256E-s1--0\n", rf"{name} is a git-annex pointer of 29 bytes: run git annex get$"),
    ):
        (folder / name).write_text(content)
        with pytest.raises(ModelError, match=says):
            found = getattr(source(folder), what)
            found()


def test_a_missing_shard_is_named(folder):
    model = transformers.OlmoeForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and source(folder).load()
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"{shards[1].name} is missing: .* names {len(shards)} shards, of which 1 "):
        source(folder).load()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ModelError, match=r"index\.json is no index of safetensors"):
        source(folder).load()


@pytest.mark.parametrize(
    ("change", "says"),
    [(lambda b: b[: len(b) // 2], r"is cut off: its header announces {n} bytes, it has {half}; get it again"),
     (lambda b: b + b"x", "is too long: its header announces {n} bytes, it has {more}"),
     (lambda b: b[:4], "is cut off: it has 4 bytes, too few for a header"),
     (lambda b: b"", "is cut off: it has 0 bytes"),
     (lambda b: b[:100], r"is cut off: it has 100 bytes, too few for a header of \d+ bytes"),
     (lambda b: b[:8] + b"x" * (len(b) - 8), "is no safetensors file")],
)  # fmt: skip
def test_a_file_that_is_cut_off(folder, change, says):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    says = says.format(n=len(whole), half=len(whole) // 2, more=len(whole) + 1)
    with pytest.raises(ModelError, match=rf"model\.safetensors {says}"):
        source(folder).load()


def test_a_broken_tokenizer_is_no_traceback(folder):
    """What transformers raises for it is a KeyError."""
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="has no tokenizer that can be read: KeyError"):
        source(folder).tokenizer()


def unnamed(folder, **ids) -> None:
    """Take end and padding tokens out of the tokenizer's settings; `ids` go into the model's."""
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in told.items() if k not in ("eos_token", "pad_token")}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    for name in ("config.json", "generation_config.json"):
        told = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        told = {k: v for k, v in told.items() if k not in ("eos_token_id", "pad_token_id")} | ids.get(name[:-5], {})
        (folder / name).write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [({"eos_token_id": 1, "pad_token_id": 0}, {}, ("</s>", "<pad>")), ({}, {"eos_token_id": [1, 0]}, ("</s>", "</s>")),
     ({"eos_token_id": 0}, {"eos_token_id": 1}, ("</s>", "</s>")), ({"eos_token_id": 9999}, {}, None), ({}, {}, None)],
)  # fmt: skip
def test_end_and_padding_tokens_that_the_tokenizer_does_not_name(folder, config, generation, expected):
    """They are what the settings of generation, else the configuration say; an id that there is not is none."""
    unnamed(folder, config=config, generation_config=generation)
    if expected is None:
        with pytest.raises(ModelError, match=r"names no eos_token in tokenizer_config\.json, generation_config"):
            source(folder).tokenizer()
        return
    tokenizer = source(folder).tokenizer()
    assert (tokenizer.eos_token, tokenizer.pad_token) == expected


def test_a_classifier_needs_no_end_token(folder):
    unnamed(folder, config={"pad_token_id": 0})
    assert ModelSource(str(folder)).tokenizer().pad_token == "<pad>"
    with pytest.raises(ModelError, match="names no eos_token"):
        source(folder).tokenizer()


def with_tokens(folder, *tokens: str) -> int:
    """Add tokens to the tokenizer alone, beyond the rows of the model; returns how many ids there are."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    filler = [f"<f{i}>" for i in range(tiny.VOCABULARY - len(tokenizer))]
    tokenizer.add_tokens([*filler, *tokens])
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def test_more_tokens_than_rows(folder):
    """Refused with both numbers; `resize` adds rows that are the mean of the others, of input and output alike."""
    n = with_tokens(folder, "<ward>", "<bed>")
    assert n == tiny.VOCABULARY + 2
    with pytest.raises(ModelError, match=rf"has ids up to {n - 1}, the model has {n - 2} embedding rows .*resize"):
        source(folder).check_texts(10)
    before, after = source(folder), source(folder, resize=True)
    after.check_texts(10)
    old, new = before.load(), after.load()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert new[name].shape[0] == n and torch.equal(new[name][:-2], old[name])
        torch.testing.assert_close(new[name][-2:], old[name].mean(0).expand(2, -1))
    model = after.build(new, "t", ())
    ids = torch.tensor([[n - 1, 5, n - 2]])
    logits = model.backbone(input_ids=ids).logits
    assert logits.shape == (1, 3, n) and flatten(model).keys() == new.keys()
    part = {block: (0, 3) for block in after.counts}
    assert after.load(part)["lm_head.weight"].shape[0] == n


def test_resize_does_nothing_where_rows_are_enough(folder):
    assert tiny.same(source(folder, resize=True).load(), source(folder).load())


def test_texts_longer_than_the_model_has_positions(folder):
    source(folder).check_texts(256)
    with pytest.raises(ConfigError, match=r"texts may have 257 tokens by fit\.max_length .* has 256 positions: lower"):
        source(folder).check_texts(257)
