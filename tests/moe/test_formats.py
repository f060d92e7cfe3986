"""Checkpoints that are not plain safetensors: MXFP4 and FP8 by hand, GGUF files, and what is refused."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from consilium.errors import ModelError
from consilium.moe.build import ModelSource
from consilium.moe.formats import gguf_place

HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of FP4 (E2M1) without their sign."""


def quantised(tmp_path, kind, changes=None, **told):
    """A copy of a tiny model with a quantization_config, its folder and its tensors."""
    folder = tmp_path / kind
    shutil.copytree(tiny.directory(kind, "text-to-text", "bfloat16", **changes or {}), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    return folder, load_file(folder / "model.safetensors")


def test_mxfp4_is_turned_back(tmp_path):
    """Blocks of 32 values: nibbles that index E2M1, low one first, times 2^(scale - 127)."""
    folder, tensors = quantised(tmp_path, "gpt_oss", {"intermediate_size": 32}, quant_method="mxfp4")
    rng = torch.Generator().manual_seed(0)
    expected = {}
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        e, x, y = tensors.pop(key).shape  # stored [E, X, Y]; its blocks are of Y rows along X, padded to 32
        blocks = -(-x // 32)
        codes = torch.randint(0, 16, (e, y, blocks * 32), generator=rng)
        scales = torch.randint(125, 129, (e, y, blocks), generator=rng)
        values = torch.tensor([*HALVES, *(-v for v in HALVES)])[codes]
        whole = values * (2.0 ** (scales - 127)).repeat_interleave(32, -1)
        assert blocks * 32 == x
        pairs = codes.view(e, y, blocks, 16, 2)
        tensors[f"{key}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
        tensors[f"{key}_scales"] = scales.to(torch.uint8)
        expected[key] = whole.transpose(1, 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = ModelSource(str(folder), "text-to-text")
    params = source.load()
    for key, whole in expected.items():
        block, name = key.removesuffix(f".experts.{key.rsplit('.', 1)[1]}"), key.rsplit(".", 1)[1]
        for i in range(8):
            assert torch.equal(params[f"{block}.experts.{i}.{name}"], whole[i])
    assert getattr(source.config, "quantization_config", None) is None
    held = dict.fromkeys(source.counts, (1, 5))
    assert tiny.same(source.load(held), {k: t for k, t in params.items() if k in source.load(held)})


def test_fp8_is_turned_back(tmp_path):
    """Weights in float8 (E4M3) with one scale per tensor block."""
    told = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "gate"]}
    folder, tensors = quantised(tmp_path, "qwen3_moe", **told)
    expected = {}
    for key in [k for k in tensors if k.endswith("_proj.weight") and ".experts." in k]:
        small = (tensors[key].float() * 4).to(torch.float8_e4m3fn)
        tensors[key], tensors[f"{key}_scale_inv"] = small, torch.full((1, 1), 0.25)
        expected[key] = small.float() * 0.25
    for key in [k for k in tensors if "self_attn" in k and k.endswith("_proj.weight")]:
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = torch.ones(1, 1)
    for key in [k for k in tensors if ".mlp." in k and ".experts." not in k and k.endswith("_proj.weight")]:
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    params = ModelSource(str(folder), "text-to-text").load()
    found = 0
    for key, whole in expected.items():
        block, rest = key.split(".experts.")
        number, name, _ = rest.split(".")
        fused = params[f"{block}.experts.{number}.{'down_proj' if name == 'down_proj' else 'gate_up_proj'}"]
        half = len(fused) // 2
        part = {"down_proj": fused, "gate_proj": fused[:half], "up_proj": fused[half:]}[name]
        torch.testing.assert_close(part, whole)
        found += 1
    assert found == 2 * 8 * 3


def test_other_kinds_are_refused(tmp_path):
    folder, _ = quantised(tmp_path, "olmoe", quant_method="gptq", bits=4)
    with pytest.raises(
        ModelError, match=r"are quantised \(gptq\), and training needs them in full: take the checkpoint"
    ):
        ModelSource(str(folder), "text-to-text").load()


def test_files_that_are_no_gguf(tmp_path):
    with pytest.raises(ModelError, match=r"'none\.gguf', which is neither a file nor one in"):
        gguf_place(str(tmp_path), "none.gguf")
    pytest.importorskip("gguf")
    (tmp_path / "odd.gguf").write_bytes(b"text")
    with pytest.raises(ModelError, match=r"odd\.gguf is no GGUF file"):
        gguf_place(str(tmp_path), "odd.gguf")
