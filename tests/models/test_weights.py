"""Which checkpoints load, and what a damaged one is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.core.errors import InvalidConfig
from baton.models.loader import load_model
from baton.models.weights import ALL, Checkpoint, Rows

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, write_llama: Callable[..., Path]) -> Path:
    return write_llama(tmp_path_factory.mktemp("weights") / "single", num_hidden_layers=2)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, write_llama: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "sharded"
    write_llama(folder, num_hidden_layers=2, max_shard_size="500KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def copy(tmp_path: Path, single: Path) -> Path:
    return Path(shutil.copytree(single, tmp_path / "copy"))


def read(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder, dtype)
    shapes = {path: load_file(path) for path in folder.glob("*.safetensors")}
    return {
        name: checkpoint.take(name, *tensor.shape)
        for tensors in shapes.values()
        for name, tensor in tensors.items()
    }


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_reads_what_was_written_and_all_of_it(single: Path) -> None:
    written = load_file(single / "model.safetensors")
    found = read(single)
    assert found.keys() == written.keys() == set(Checkpoint(single, torch.float32))
    assert all(torch.equal(found[name], written[name]) for name in written)


def test_shards_hold_the_same_as_one_file(single: Path, sharded: Path) -> None:
    one, many = read(single), read(sharded)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_disk_becomes_float32(
    tmp_path: Path, write_llama: Callable[..., Path], dtype: str
) -> None:
    folder = write_llama(tmp_path / "half", num_hidden_layers=1, dtype=dtype)
    written = load_file(folder / "model.safetensors")
    assert {str(w.dtype) for w in written.values()} == {f"torch.{dtype}"}
    for name, weight in read(folder).items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, written[name].float())


def test_a_tied_model_needs_no_output_matrix_and_ignores_one(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"tie_word_embeddings": True}
    (copy / "config.json").write_text(json.dumps(config))
    load_model(copy)
    edit(copy, lambda tensors: tensors.pop("lm_head.weight"))
    load_model(copy)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(copy: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(copy, lambda tensors: tensors.update({name: torch.ones(8)}))
    load_model(copy)


def test_layers_for_other_ends_are_ignored_where_the_family_has_them(copy: Path) -> None:
    names = [f"model.layers.{layer}.eh_proj.weight" for layer in (2, 3)]
    edit(copy, lambda tensors: tensors.update({name: torch.ones(2) for name in names}))
    checkpoint = Checkpoint(copy, torch.float32)
    for name, tensor in load_file(copy / "model.safetensors").items():
        if name not in names:
            checkpoint.take(name, *tensor.shape)
    checkpoint.finish(tie=False, layers=2, spare_layers=2)
    with pytest.raises(InvalidConfig, match=r"unknown.*layers\.3\.eh_proj\.weight"):
        checkpoint.finish(tie=False, layers=2, spare_layers=1)


def test_weights_in_the_wanted_type_are_mapped_and_not_copied(single: Path) -> None:
    name = "model.embed_tokens.weight"
    taken = Checkpoint(single, torch.float32).take(name, 1024, 128)
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in maps
        if line.endswith(str(single / "model.safetensors"))
    ]
    assert any(start <= taken.data_ptr() < end for start, end in mapped)
    other = Checkpoint(single, torch.bfloat16).take(name, 1024, 128)
    assert not any(start <= other.data_ptr() < end for start, end in mapped)


def test_a_cut_of_a_tensor_is_copied_and_its_mapping_gone(single: Path) -> None:
    name = "model.embed_tokens.weight"
    written = load_file(single / "model.safetensors")[name]
    before = Path("/proc/self/maps").read_text().count(str(single))
    checkpoint = Checkpoint(single, torch.float32)
    found = checkpoint.take(name, 1024, 128, cut=(slice(3, 700), slice(64, 96)))
    assert torch.equal(found, written[3:700, 64:96])
    assert found.is_contiguous()
    rows = checkpoint.take(name, 1024, 128, cut=(slice(3, 700),))
    assert torch.equal(rows, written[3:700])
    del checkpoint
    assert Path("/proc/self/maps").read_text().count(str(single)) == before
    half = Checkpoint(single, torch.bfloat16).take(name, 1024, 128, cut=(slice(5),))
    assert torch.equal(half, written[:5].bfloat16())


def test_wanted_rows_of_several_matrices_as_one(single: Path, copy: Path) -> None:
    at = "model.layers.0.self_attn."
    written = load_file(single / "model.safetensors")
    q, k = (written[f"{at}{name}_proj.weight"] for name in "qk")
    (q_rows, _), (k_rows, _) = q.shape, k.shape
    parts = [
        Rows(f"{at}q_proj", q_rows, slice(16, 32)),
        Rows(f"{at}k_proj", k_rows, slice(0, 16)),
    ]
    expected = torch.cat([q[16:32], k[:16]])
    found, _ = Checkpoint(single, torch.float32).take_fused("", parts, width=128, bias=False)
    assert torch.equal(found, expected)
    edit(copy, lambda tensors: tensors.update({f"{at}qk_proj.weight": torch.cat([q, k])}))
    checkpoint, whole = Checkpoint(copy, torch.float32), f"{at}qk_proj"
    found, _ = checkpoint.take_fused(whole, parts, width=128, bias=False)
    assert torch.equal(found, expected)
    complete = [part._replace(wanted=ALL) for part in parts]
    found, _ = checkpoint.take_fused(whole, complete, width=128, bias=False)
    assert torch.equal(found, torch.cat([q, k]))


def test_tensors_of_other_ranks_are_not_missed(single: Path) -> None:
    """Of other layers nothing is; within the own layers, and of no layer, everything is."""
    taken = [name for name in load_file(single / "model.safetensors") if ".layers.0." in name]
    ends = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    checkpoint = Checkpoint(single, torch.float32)
    checkpoint.leave(*taken)
    with pytest.raises(InvalidConfig, match=r"unknown.*lm_head\.weight, model\.embed"):
        checkpoint.finish(tie=False, layers=2, spare_layers=0, own=range(1))
    checkpoint.leave(*ends)
    checkpoint.finish(tie=False, layers=2, spare_layers=0, own=range(1))
    with pytest.raises(InvalidConfig, match=r"unknown.*layers\.1\."):
        checkpoint.finish(tie=False, layers=2, spare_layers=0, own=range(1, 2))


def test_refuses_missing_tensors_by_name(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InvalidConfig, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(copy)


def test_refuses_unknown_tensors_by_name(copy: Path) -> None:
    names = [f"model.layers.{n}.mlp.down_proj.weight" for n in range(2, 8)]
    edit(copy, lambda tensors: tensors.update({name: torch.ones(2) for name in names}))
    with pytest.raises(InvalidConfig, match=r"unknown.*layers\.2\.mlp\.down_proj.* and 3 more"):
        load_model(copy)


def test_refuses_misshapen_tensors_by_name(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"model.norm.weight": torch.ones(127)}))
    with pytest.raises(InvalidConfig, match=r"model\.norm\.weight: \[127\].*\[128\]"):
        load_model(copy)


def test_refuses_tensors_of_another_type_by_name(copy: Path) -> None:
    edit(
        copy, lambda tensors: tensors.update({"model.norm.weight": torch.ones(128).to(torch.int8)})
    )
    with pytest.raises(InvalidConfig, match=r"model\.norm\.weight.*I8.*BF16, F16, F32"):
        read(copy)


@pytest.mark.parametrize("keep", [0, 4, 5000, -100])
def test_refuses_a_file_that_is_cut_short(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InvalidConfig, match=r"model\.safetensors.*a safetensors file"):
        read(copy)


def test_refuses_a_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(InvalidConfig, match=rf"holds the file model\.safetensors or {INDEX}"):
        read(copy)


def test_refuses_a_missing_shard_by_name(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InvalidConfig, match=shard.name):
        read(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": "../model.safetensors"}])
def test_refuses_an_index_that_makes_no_sense(copy: Path, weight_map: object) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidConfig, match="weight_map"):
        read(copy)


def test_refuses_bad_arguments(single: Path) -> None:
    with pytest.raises(InvalidConfig, match="threads"):
        load_model(single, threads=0)
    with pytest.raises(InvalidConfig, match=r"dtype.*int4.*float32, bfloat16, float16"):
        load_model(single, dtype="int4")
