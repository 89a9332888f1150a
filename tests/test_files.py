"""Files of weights stay small, and a folder appears complete or not at all."""

import gc
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import WIDTHS, compacted, export, logits, named_state, tiny_model, tokens
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from scale_prune.checkpoint import folder as checkpoint_folder
from scale_prune.checkpoint.folder import newest_first, set_newer_aside
from scale_prune.checkpoint.writing import save
from scale_prune.config.settings import Config
from scale_prune.models.layer_units import unit_groups
from scale_prune.run.output import _replace_output
from scale_prune.system.folders import UNFINISHED, complete_or_absent, write_atomically


@pytest.mark.parametrize("layout", WIDTHS)
def test_shards_hold_no_more_than_asked_and_load(tmp_path: Path, layout: str) -> None:
    model, groups, masked = compacted("gpt_neo", layout)
    limit = 29 * 11 * 4
    folder = export(tmp_path / "pruned", model, groups, layout, max_file_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards.values()]
    assert len(shards) > 5
    assert all(size <= limit or len(shard) == 1 for size, shard in zip(sizes, shards.values(), strict=True))
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=layout == "per_layer")
    torch.testing.assert_close(logits(again, tokens()), masked, rtol=0, atol=1e-5)


def live_bytes() -> int:
    """Return the bytes of all tensors that the garbage collector follows."""
    storages = [tensor.untyped_storage() for tensor in gc.get_objects() if type(tensor) is Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=11)
    sizes = [tensor.nbytes for _, tensor in named_state(model)]
    limit = sum(sizes) // 4
    alive: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_state(model):
            alive.append(live_bytes())
            yield name, tensor

    gc.freeze()  # takes what exists already out of the count
    export(tmp_path / "pruned", model, unit_groups(model), "uniform", tensors=stream(), max_file_bytes=limit)
    gc.unfreeze()
    # A shard, the copy that did not fit into it any more, and the tensor that the stream still holds.
    assert 0.8 * limit < max(alive) <= limit + 2 * max(sizes) < 1.6 * limit


def test_a_broken_stream_leaves_nothing(tmp_path: Path) -> None:
    model, groups, _ = compacted("gpt2", "uniform")

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from list(named_state(model))[:5]
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        export(tmp_path / "pruned", model, groups, "uniform", tensors=stream())
    assert not any(tmp_path.iterdir())


def test_a_folder_with_contents_is_left_alone(tmp_path: Path) -> None:
    model, groups, _ = compacted("gpt2", "uniform")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something"):
        export(tmp_path, model, groups, "uniform")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_somebody_else_has_put_beside_stays(tmp_path: Path) -> None:
    theirs = {
        f"{name}{end}/notes": "mine" for name in ("new", "old") for end in (".partial", ".old", ".partial-0a1b2c3d")
    }
    theirs |= {"file.json.partial": "mine"}
    for name, text in theirs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    killed = tmp_path / "new.partial-01234567"
    killed.mkdir()
    (killed / UNFINISHED).touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "result").write_text("before")
    with pytest.raises(OSError, match="full"), complete_or_absent(tmp_path / "old", replace=True):
        raise OSError("the disk is full")
    assert tree(tmp_path / "old") == {"result": "before"}
    for name in ("new", "old"):
        with complete_or_absent(tmp_path / name, replace=name == "old") as partial:
            (partial / "result").write_text("now")
    write_atomically(tmp_path / "file.json", "now")
    assert tree(tmp_path) == theirs | {"new/result": "now", "old/result": "now", "file.json": "now"}


def replace_at_once(folder: Path) -> None:
    with complete_or_absent(folder, replace=True) as partial:
        (partial / "result").write_text("now")


@pytest.mark.parametrize("replace", [replace_at_once, partial(_replace_output, Config())], ids=["at once", "aside"])
def test_what_was_to_be_replaced_has_its_name_again_when_the_new_folder_cannot_have_it(
    replace: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "out", Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name.startswith("out.partial-"):
            raise OSError("the disk is gone")
        return rename(path, target)

    folder.mkdir()
    (folder / "result").write_text("before")
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        replace(folder)
    assert tree(tmp_path) == {"out/result": "before"}


def test_a_checkpoint_that_somebody_reads_while_it_is_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*args: object, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError("Directory not empty")

    alone: Any = SimpleNamespace(rank=0, world_size=1, is_main=True)
    monkeypatch.setattr(checkpoint_folder, "of_all_ranks", lambda problem: [problem])
    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (1, 2, 3):
        state = {"step": step, "perplexities": {"dense": math.inf}}
        written = save(tmp_path, state=state, slices=[], runtime=alone, keep=1)
        assert json.loads((written / "state.json").read_text()) == state
        assert newest_first(tmp_path) == [written]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    disk, link, broken = tmp_path / "disk", tmp_path / "link", tmp_path / "broken"
    disk.mkdir()
    link.symlink_to(disk)
    broken.symlink_to(broken)
    with complete_or_absent(link) as partial:
        (partial / "result").touch()
    assert link.is_symlink()
    assert tree(disk) == {"result": ""}
    with pytest.raises(ValueError, match="broken is not a folder; give"), complete_or_absent(broken):
        raise RuntimeError("computed in vain")


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, link = tmp_path / "volume", tmp_path / "link"
    volume.mkdir()
    link.symlink_to(volume)
    monkeypatch.setattr("os.path.ismount", lambda path: path == volume)
    for folder in (volume, link):
        with pytest.raises(ValueError, match=r"is a mount point.*give a folder below it"), complete_or_absent(folder):
            raise RuntimeError("computed in vain")
    with complete_or_absent(volume / "below") as partial:
        (partial / "result").touch()
    assert [path.name for path in volume.iterdir()] == ["below"]


def test_checkpoints_that_were_abandoned_stay_however_often(tmp_path: Path) -> None:
    for text in ("first", "second", "third"):
        folder = tmp_path / "checkpoints" / "step-00000008"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(text)
        set_newer_aside(tmp_path, 4)
    assert newest_first(tmp_path) == []
    assert set(tree(tmp_path).values()) == {"first", "second", "third"}
