"""What `consilium data` says of images before they are used."""

import numpy as np
import pictures
import pytest
from PIL import Image

from consilium.cli.views.images import preview_images
from consilium.errors import ConfigError

SETTINGS = {"clients": 2, "partition": "iid"}


def test_blank_and_identical_images_are_counted(tmp_path):
    """Two blank ones of different classes, and a copy of a third."""
    root = pictures.folder(tmp_path / "pets", 24)
    for name in ("cat", "dog"):
        Image.new("RGB", (8, 8), "white").save(root / name / "blank.png")
    (root / "cat" / "copy.png").write_bytes((root / "cat" / "000.png").read_bytes())
    (root / "Thumbs.db").touch()
    facts = preview_images(root, {}, SETTINGS, 0, 0).facts
    assert "skipped 1 of the operating system or hidden: Thumbs.db" in facts
    assert "warning: blank images (all pixels alike): 2 of 27" in facts
    assert "warning: images that are identical to another: 4 of 27, 2 of them to one of another class" in facts
    assert not any(
        "warning" in fact for fact in preview_images(pictures.folder(tmp_path / "b"), {}, SETTINGS, 0, 0).facts
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_contact_sheet(tmp_path, channels):
    """A row of each class, in which its pixels can be seen: a class that is all red shows red."""
    root = pictures.folder(tmp_path / "pets", 24, channels=channels)
    for i in range(8):
        (root / "red").mkdir(exist_ok=True)
        x = np.full((8, 8, 3), (255, 0, 0), np.uint8)
        x[0, i] = 0
        Image.fromarray(x).save(root / "red" / f"{i}.png")
    target = tmp_path / "sheet.png"
    found = preview_images(root, {}, SETTINGS, 0, 0, target)
    assert f"images as they were read: {target}" in found.facts
    drawn = np.asarray(Image.open(target).convert("RGB")).astype(int)
    red = (drawn[..., 0] > 240) & (drawn[..., 1] < 15) & (drawn[..., 2] < 15)
    rows = np.flatnonzero(red.sum(1) > 100)
    assert len(rows) > 50 and rows.min() > drawn.shape[0] / 2, "the fourth row of four"
    with pytest.raises(ConfigError, match=r"sheet\.nothing cannot be written"):
        preview_images(root, {}, SETTINGS, 0, 0, tmp_path / "sheet.nothing")
