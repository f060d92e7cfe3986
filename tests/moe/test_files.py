"""A saved sub-MoE comes back bit for bit, for every family; a wrong keep-map is told apart from a right one."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from consilium.errors import ModelError
from consilium.moe.addressing import flatten
from consilium.moe.files import MAP, WEIGHTS, load_sub_moe, save_sub_moe


def labels_of(form):
    return tiny.TASKS["animal"] if form == "classification" else ()


def saved(folder, model_type, form, dtype="float32"):
    """(model, held, a batch) of an uneven slice, which is also saved."""
    source = tiny.source(model_type, form, dtype)
    held = {block: ((1, 4, 6), (0, 7))[i % 2] for i, block in enumerate(source.counts)}
    params = source.load() | {k: t.to(source.torch_dtype) for k, t in tiny.heads("animal", labels_of(form)).items()}
    model = source.build(params, "animal", labels_of(form), held).eval()
    save_sub_moe(folder, source, model, held)
    return model, held, tiny.batch(source)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_it_comes_back_bit_for_bit(model_type, form, dtype, tmp_path):
    """The same parameters, outputs and generated tokens, from the directory alone."""
    model, held, batch = saved(tmp_path / "m", model_type, form, dtype)
    shutil.move(tmp_path / "m", tmp_path / "moved")
    source, again, kept = load_sub_moe(tmp_path / "moved")
    again.eval()
    assert kept == held and (again.task, again.labels) == (model.task, model.labels)
    assert tiny.same(flatten(again, held), flatten(model, held))
    with torch.no_grad():
        assert torch.equal(again(batch)[0], model(batch)[0])
    if form == "text-to-text":
        assert torch.equal(again.generate(batch, 4), model.generate(batch, 4))
    assert source.tokenizer()("a cat")["input_ids"] == tiny.tokenizer()("a cat")["input_ids"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    saved(folder, "olmoe", "classification")
    return folder


FIRST, SECOND = "layers.0.mlp", "layers.1.mlp"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"experts": {FIRST: [1, 4, 6]}}, f"'{SECOND}' is not both"),
        ({"experts": {FIRST: [1, 4, 6], SECOND: [0, 8]}}, r"\[0, 8\] must be ascending, distinct and within 0..7"),
        ({"experts": {FIRST: [6, 4, 1], SECOND: [0, 7]}}, "must be ascending"),
        ({"experts": {FIRST: [1, 4, 6], SECOND: []}}, "would keep no expert"),
        ({"experts": {FIRST: [1, 4, 5], SECOND: [0, 7]}}, f"expert 5 of {FIRST} is in the map but not in the weights"),
        ({"experts": {FIRST: [1, 4], SECOND: [0, 7]}}, f"expert 6 of {FIRST} is in the weights but not in the map"),
        ({"experts": [1]}, "is no keep-map"),
        ({"dtype": "int4"}, "is no keep-map"),
        ({"labels": ["cat", "cow"]}, "the parameters lack 'head.animal.cow.weight'"),
    ],
)
def test_a_wrong_map_is_told(good, tmp_path, change, says):
    folder = shutil.copytree(good, tmp_path / "m")
    told = json.loads((folder / MAP).read_text())
    (folder / MAP).write_text(json.dumps(told | change))
    with pytest.raises(ModelError, match=says):
        load_sub_moe(folder)


def test_missing_and_broken_files_are_told(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "m")
    (folder / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(ModelError, match=f"{WEIGHTS} is cut off: it has 4 bytes"):
        load_sub_moe(folder)
    for text in ("{", "[]"):
        (folder / MAP).write_text(text)
        with pytest.raises(ModelError, match=MAP):
            load_sub_moe(folder)
    with pytest.raises(ModelError, match="holds no sub-MoE"):
        load_sub_moe(tmp_path / "nowhere")


def test_weights_of_another_shape_are_told(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "m")
    params = load_file(folder / WEIGHTS)
    params["norm.weight"] = torch.ones(5)
    save_file(params, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"'norm.weight' has shape \(32,\), the parameters \(5,\)"):
        load_sub_moe(folder)
