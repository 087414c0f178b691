"""A checkpoint comes back whole, and a damaged or half-written one never does."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from common.errors import RunError
from common.records import PrivacyStatement
from server import run_folder
from server.run_folder import LeftOut, ServerState

ARRAYS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(1, np.float32)}
OPTIMISER = {"m_t/w": np.full((2, 3), 0.1)}


def state(round: int) -> ServerState:
    return ServerState(
        round=round,
        best_round=1,
        best_score=0.5,
        statements={"north": PrivacyStatement(site="north", round=round)},
        left_out=[LeftOut(round=1, site="south", phase="train", reason="late")],
    )


def test_everything_comes_back(tmp_path: Path) -> None:
    run_folder.save_checkpoint(tmp_path, state(3), ARRAYS, {"w": ARRAYS["w"] + 1}, OPTIMISER)
    found = run_folder.newest_checkpoint(tmp_path)
    assert found is not None
    loaded, groups = found
    assert loaded == state(3)
    np.testing.assert_array_equal(groups["model"]["w"], ARRAYS["w"])
    np.testing.assert_array_equal(groups["best"]["w"], ARRAYS["w"] + 1)
    assert groups["optimiser"]["m_t/w"].dtype == np.float64
    np.testing.assert_array_equal(groups["optimiser"]["m_t/w"], OPTIMISER["m_t/w"])


def test_a_checkpoint_of_0_1_is_read(tmp_path: Path) -> None:
    """There the state is in the header of the file."""
    arrays = {f"{group}/{name}": array for group in ("model", "best") for name, array in ARRAYS.items()}
    text = state(3).model_dump_json()
    metadata = {"state": text, "digest": run_folder._digest_of(arrays, text.encode())}
    safetensors.numpy.save_file(arrays, tmp_path / "round-00003.safetensors", metadata=metadata)
    found = run_folder.newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == state(3)
    assert set(found[1]["model"]) == set(ARRAYS)


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for number in range(1, 5):
        run_folder.save_checkpoint(tmp_path, state(number), ARRAYS, ARRAYS, {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["round-00003.safetensors", "round-00004.safetensors"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    for number in (1, 2):
        run_folder.save_checkpoint(tmp_path, state(number), ARRAYS, ARRAYS, {})
    newest = tmp_path / "round-00002.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[-3] ^= 0xFF
    newest.write_bytes(
        {"flip": bytes(content), "truncate": bytes(content[: len(content) // 2]), "empty": b""}[damage]
    )
    found = run_folder.newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].round == 1


def test_no_checkpoint_is_no_error_but_only_damaged_ones_are(tmp_path: Path) -> None:
    assert run_folder.newest_checkpoint(tmp_path) is None
    (tmp_path / "round-00001.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RunError, match="no intact checkpoint"):
        run_folder.newest_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.save_checkpoint(tmp_path, state(1), ARRAYS, ARRAYS, {})

    def full(tensors: object, filename: Path, metadata: object = None) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "save_file", full)
    with pytest.raises(RunError, match="No space left"):
        run_folder.save_checkpoint(tmp_path, state(2), ARRAYS, ARRAYS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["round-00001.safetensors"]
    monkeypatch.setattr(run_folder, "save_file", safetensors.numpy.save_file)
    found = run_folder.newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].round == 1
