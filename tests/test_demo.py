import random

import pytest
from PIL import ImageChops

import demo


def test_the_same_pictures_on_every_run(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PER_CLASS", {"train": 2, "val": 1, "test": 1})
    demo.main([str(tmp_path / "a")])
    first = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*.jpg")}
    assert len(first) == len(set(first.values())) == 8
    demo.main([str(tmp_path / "a")])  # again, over itself
    assert {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*.jpg")} == first


def test_cats_and_dogs_differ_though_drawn_from_the_same_numbers():
    cat, dog = (demo.draw_face(kind, random.Random(3)) for kind in ("cat", "dog"))
    assert cat.size == dog.size == (demo.SIDE, demo.SIDE)
    assert ImageChops.difference(cat, dog).getbbox() is not None


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_never_draws_over_something_else(tmp_path, error_of, taken):
    target = tmp_path / "x"
    if taken == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine.jpg").write_text("mine")
    assert "holds something else" in error_of(demo.main, [str(target)])
    assert "mine" in (target if taken == "file" else target / "mine.jpg").read_text()
