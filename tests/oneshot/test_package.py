"""The file of a site: what is written is read, and whatever is not a whole, signed package is refused by name."""

import json
import struct
from dataclasses import replace

import pytest
import sites
import torch
from safetensors.torch import save

from consilium.certificates import site_key
from consilium.errors import PackageError
from consilium.oneshot.package import read, to_bytes


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "north.safetensors"
    path.write_bytes(to_bytes(sites.signed("adapter", "north")))
    return path


def test_what_is_written_is_read(tmp_path):
    for kind in ("adapter", "gated", "expert"):
        package = sites.signed(kind, "north")
        path = tmp_path / f"{kind}.safetensors"
        path.write_bytes(to_bytes(package))
        again = read(path, sites.layout())
        assert again.metadata == package.metadata and again.signature == package.signature
        assert all(torch.equal(again.tensors[name], t) for name, t in package.tensors.items())
        assert to_bytes(again) == path.read_bytes()


def rewritten(file, change_told=None, change_header=None):
    """The file with another JSON, or another header; tensors as they are."""
    blob = file.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header, rest = json.loads(blob[8 : 8 + length]), blob[8 + length :]
    if change_told:
        told = json.loads(header["__metadata__"]["consilium"])
        change_told(told)
        header["__metadata__"]["consilium"] = json.dumps(told, sort_keys=True)
    if change_header:
        change_header(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(site="../../x"), "site is"),
        (lambda t: t.update(examples=0), "must be greater than 0"),
        (lambda t: t.update(examples=True), "examples is a bool"),
        (lambda t: t.update(kind="code"), "kind and router"),
        (lambda t: t.update(format=2), "format is 2"),
        (lambda t: t.update(more=1), "must have the fields"),
        (lambda t: t.update(scale=float("inf")), "must be greater than 0"),
        (lambda t: t.update(frozen="0" * 64), "another public model"),
        (lambda t: t.update(settings={}), "kind_of_text"),
        (lambda t: t.update(card={"about": "x" * 70_000}), "allowed are"),
        (lambda t: t.update(examples=33), "not signed"),
        (lambda t: t.update(card={"licence": "other"}), "not signed"),
        (lambda t: t.update(signature="00"), "not signed"),
        (lambda t: t.update(tensors="0" * 64), "other tensors"),
    ],
)
def test_other_metadata_is_refused(file, change, said):
    with pytest.raises(PackageError, match=said):
        read(rewritten(file, change_told=change), sites.layout())


def first(header):
    return next(name for name in header if name.endswith("lora_A"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h[first(h)].update(dtype="I64"), "F32 or BF16"),
        (lambda h: h[first(h)].update(shape=[2, 2**62]), "as long as its shape"),
        (lambda h: h[first(h)].update(shape=[-4, -32]), "as long as its shape"),
        (lambda h: h[first(h)].update(shape=[32, 4]), "does not belong"),
        (lambda h: h[first(h)].update(data_offsets=[4, 516]), "overlap|as long"),
        (lambda h: h.update({"head.weight": h.pop(first(h))}), "does not belong"),
        (lambda h: h.update({"model.layers.0.mlp.experts.gate_up_proj": h.pop(first(h))}), "does not belong"),
        (lambda h: h.pop(first(h)), "overlap"),
        (lambda h: h.update(__metadata__={}), "no package"),
        (lambda h: h["__metadata__"].update(more="1"), "no package"),
    ],
)
def test_other_headers_are_refused(file, change, said):
    with pytest.raises(PackageError, match=said):
        read(rewritten(file, change_header=change), sites.layout())


def test_a_missing_half_of_an_adapter_is_refused(tmp_path):
    package = sites.signed("adapter", "north")
    name = next(n for n in package.tensors if n.endswith("lora_B"))
    less = replace(package, tensors={n: t for n, t in package.tensors.items() if n != name})
    path = tmp_path / "less.safetensors"
    path.write_bytes(to_bytes(less.signed(site_key(tmp_path / "key"))))
    with pytest.raises(PackageError, match="lacks 1 tensors"):
        read(path, sites.layout())


def test_numbers_that_are_not_finite_are_refused_although_they_are_signed(tmp_path):
    package = sites.signed("adapter", "north")
    name = next(iter(package.tensors))
    broken = package.tensors[name].clone()
    broken.view(-1)[0] = float("nan")
    path = tmp_path / "nan.safetensors"
    path.write_bytes(to_bytes(replace(package, tensors={**package.tensors, name: broken}).signed(site_key(tmp_path))))
    with pytest.raises(PackageError, match="not finite"):
        read(path, sites.layout())


def test_files_that_are_none_are_refused_before_they_are_read(file, tmp_path):
    layout = sites.layout()
    with pytest.raises(PackageError, match="a package has"):
        read(file, layout, max_bytes=100)
    blob = file.read_bytes()
    for content, said in (
        (b"", "has 0 bytes"),
        (struct.pack("<Q", 2**63) + blob[8:], "announces a header"),
        (struct.pack("<Q", 5_000_000) + b" " * 5_000_100, "announces a header"),
        (blob[:-1], "overlap"),
        (blob + b"0", "overlap"),
        (struct.pack("<Q", 20_000) + b"[" * 20_000, "no package"),
        (save({"x": torch.ones(2)}), "no package"),
        (blob.replace(b'"dtype"', b'"shape"', 1), "no package"),
    ):
        file.write_bytes(content)
        with pytest.raises(PackageError, match=said):
            read(file, layout)
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(PackageError, match="cannot be opened"):
        read(tmp_path / "link", layout)
    with pytest.raises(PackageError, match="not an ordinary file"):
        read(tmp_path, layout)


def test_every_byte_counts(file):
    """A changed bit anywhere in the file is an error, never another package."""
    blob, layout = file.read_bytes(), sites.layout()
    rng = torch.Generator().manual_seed(0)
    for place in torch.randint(0, len(blob), (60,), generator=rng).tolist():
        file.write_bytes(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])
        try:
            assert read(file, layout).metadata == sites.signed("adapter", "north").metadata  # a blank of the header
        except PackageError:
            continue
