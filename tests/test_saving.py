"""A model from the shards of real ranks into files, which all of them write."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from engines import call_each, ds_config, saved_model
from safetensors.torch import load_file, save_file

from scale_prune.export import Export
from scale_prune.models import stored_groups
from scale_prune.system import tensor_files
from scale_prune.zero3 import Zero3Backend, inference_engine, load_model, write_model

pytestmark = pytest.mark.distributed

FILE_BYTES = 1500


def written(path: Path, folder: Path, failing: int = -1, blind: tuple[int, ...] = ()) -> tuple[list[str], str]:
    """Write a model anew in several files; return those that this rank has written, and the message of an error.

    Args:
        path: the model.
        folder: to write.
        failing: a rank whose disk is full.
        blind: ranks that do not see the disk.
    """
    engine = inference_engine(load_model(str(path), ds_config()), ds_config())
    backend, own = Zero3Backend(engine), []

    def save(tensors: dict[str, Any], file: Path, metadata: dict[str, str]) -> None:
        if backend.rank == failing:
            raise OSError("No space left on device")
        own.append(file.name)
        save_file(tensors, file, metadata=metadata)

    export = Export(
        config=engine.module.config,
        groups=stored_groups(engine.module),
        layout="per_layer",
        tokenizer=None,
        card="# Pruned",
    )
    message, is_dir = "", Path.is_dir
    sees = lambda path, **options: backend.rank not in blind and is_dir(path, **options)  # noqa: E731
    with patch.object(tensor_files, "save_file", save), patch.object(Path, "is_dir", sees):
        try:
            write_model(backend, export, folder, max_file_bytes=FILE_BYTES)
        except ValueError as error:
            message = str(error)
    engine.destroy()
    return own, message


def test_files_are_written_by_all_ranks_that_see_the_disk_or_by_none(tmp_path: Path) -> None:
    path = saved_model(tmp_path, "gpt_neo")
    cases: list[Any] = [
        (path, tmp_path / "all"),
        (path, tmp_path / "some", -1, (1,)),
        (path, tmp_path / "one", -1, (1, 2)),
        (path, tmp_path / "full", 2),
        (path, path),
    ]
    ranks = run_ranks(call_each, 3, written, cases)
    everything = load_file(path / "model.safetensors")
    for case, writers in enumerate(((0, 1, 2), (0, 2), (0,))):
        folder, files = cases[case][1], [rank[case][0] for rank in ranks]
        total = sum(map(len, files))
        assert total > 6
        assert [message for _, message in (rank[case] for rank in ranks)] == ["", "", ""]
        for place, rank in enumerate(writers):
            assert files[rank] == [f"portion-{number}" for number in range(place, total, len(writers))]
        places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(set(places.values())) == total
        assert places.keys() == everything.keys()
        for name, file in places.items():
            assert torch.equal(load_file(folder / file)[name], everything[name])
    assert {rank[3][1] for rank in ranks} == {f"{tmp_path / 'full'} cannot be written: No space left on device"}
    assert {rank[4][1].split("; ")[0] for rank in ranks} == {f"{path} cannot be written: {path} holds something"}
    assert {each.name for each in tmp_path.iterdir()} == {"gpt_neo", "all", "some", "one"}
