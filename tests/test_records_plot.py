"""python -m records.plot: what it writes, and what it says where there is nothing to draw."""
import json

import pytest

from records.plot import main

matplotlib_image = pytest.importorskip("matplotlib.image")


def folder_with(path, losses, target=3.28):
    path.mkdir()
    points = [{"step": n, "tokens": 1000 * n, "train_time_s": 0.5 * n, "val_loss": loss}
              for n, loss in enumerate(losses)]
    (path / "record.json").write_text(json.dumps({"track": "text-local", "name": "muon", "target": target,
                                                  "validation": points}))
    return path


def amount(image, red, green, blue):
    """Number of pixels of about this colour."""
    return int((abs(image[..., :3] - [red, green, blue]).max(-1) < 0.15).sum())


@pytest.mark.filterwarnings("error")        # matplotlib warns where the layout fails
@pytest.mark.parametrize("losses, target", [
    ([10.8, 5.0, 4.0, 3.5, 3.3, 3.27], 3.28), ([4.0], None), ([4.0, None, 3.9], 3.28), ([3.0, 3.0], 3.0), ([], 3.28)])
def test_curve(tmp_path, capsys, losses, target):
    folder = folder_with(tmp_path / "record", losses, target)
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'loss.png'}\n"
    image = matplotlib_image.imread(folder / "loss.png")
    assert image.shape[:2] == (630, 1500)
    assert (amount(image, 0.12, 0.37, 0.75) > 50) == bool(losses)           # the curve
    assert (amount(image, 0.78, 0.22, 0.18) > 200) == (target is not None)  # the dashed line
    assert sorted(file.name for file in folder.iterdir()) == ["loss.png", "record.json"]


def test_what_is_no_record(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"cannot read {tmp_path / 'record.json'}" in message and "expected a record's folder" in message
    assert main([]) == 2 and "usage: python -m records.plot FOLDER" in capsys.readouterr().err
