"""The examples run, and show what they promise."""

import re

from examples import continue_from_packed, demo


def test_the_demo_trains_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.digits, "EPOCHS", 20)
    found, travel = demo.train_all(hidden=8, seeds=1)
    assert set(found) == {"full precision", "straight-through", "askew_cuda"}
    assert all(10 < accuracy <= 100 for method in found.values() for values in method.values() for accuracy in values)
    assert travel.epsilon[0] == 1
    assert travel.epsilon[-1] == 0
    demo.draw(found, travel, tmp_path / "digits.png")
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert re.search(r"^ternary +\d+\.\d\d +\d+\.\d\d$", demo.table(found, 8, 1), flags=re.MULTILINE)


def test_training_goes_on_from_a_packed_file(tmp_path):
    first, before, after, changed = continue_from_packed.main(tmp_path)
    assert first > 93
    assert before < 60
    assert after > 93
    assert changed > 500
    assert {path.name for path in tmp_path.iterdir()} == {"digits.safetensors", "mirrored.safetensors"}
