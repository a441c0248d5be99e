"""Files and indexes of checkpoints: a message for every way to be unsound."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dsv4c.errors import CheckpointError
from dsv4c.runtime.checkpoint import Checkpoint


def open_fails(path, match):
    with pytest.raises(CheckpointError, match=match) as error:
        Checkpoint.open(path)
    assert str(path) in str(error.value)


def test_paths_without_a_checkpoint(tmp_path):
    open_fails(tmp_path / "nowhere", "no such file or folder")
    open_fails(tmp_path, "no checkpoint here; expected model.safetensors .*found an empty folder")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    open_fails(tmp_path, "found pytorch_model.bin")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"abc", "it has 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"\x80\x04\x95abcdefgh", "pickle"),
        (b"GGUF\x03\x00\x00\x00abcd", "GGUF"),
        (b"hello, this is text", "starts with b'hello, th'"),
        (bytes(16), "it starts with"),
    ],
)
def test_foreign_files_are_recognized(tmp_path, content, what):
    (tmp_path / "model.safetensors").write_bytes(content)
    open_fails(tmp_path, f"not a safetensors file: .*{what}")


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.001])
def test_a_truncated_file_is_named(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(10_000), "b": torch.ones(10)}, file)
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * keep)])
    open_fails(
        file.parent, r"model\.safetensors: truncated: its (tensors|header) needs? [\d,]+ bytes, the file has"
    )


def raw_file(path, header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)
    return path


def spec(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": spec(0, 4), "b": spec(2, 6)}, "tensor b overlaps a"),
        ({"a": spec(0, 4), "b": spec(6, 8)}, "tensor b leaves a gap after a"),
        ({"a": spec(2, 4)}, "tensor a leaves a gap after the header"),
        ({"a": spec(0, 4, [3])}, r"tensor a takes 4 bytes .*U8 \[3\] needs 3"),
        ({"a": spec(0, 4, dtype="F4")}, "tensor a has the unknown dtype 'F4'"),
        ({"a": {"dtype": "U8", "shape": [4]}}, "tensor a has a malformed header entry"),
        ({"a": spec(0, 4, [-4])}, "tensor a has a malformed header entry"),
        ({"a": 5}, "tensor a has a malformed header entry: 5"),
        ({"a": spec(0, 4)}, "4 bytes after the last tensor"),
        ({"a": spec(0, 80)}, "truncated: .*1 tensors are cut off, a among them"),
        ([1, 2], r"not a safetensors file: it starts with .*\['"),
        (b'{"a": 1, "a": 2}', "a is given twice"),
        (b"{nonsense}", "its header cannot be read"),
        (b'{"a": ' + b"[" * 100_000, "its header cannot be read: is nested too deeply"),
        ({"a": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}}, "tensor a has a malformed header"),
        (b"{\xff\xfe}", "its header cannot be read"),
    ],
)
def test_damaged_headers(tmp_path, header, message):
    open_fails(raw_file(tmp_path / "model.safetensors", header, bytes(8)), message)


@pytest.fixture
def shards(tmp_path):
    a, b = {"x": torch.ones(3), "y": torch.zeros(2)}, {"z": torch.full((4,), 2.0)}
    save_file(a, tmp_path / "one.safetensors")
    save_file(b, tmp_path / "two.safetensors")
    where = {"x": "one.safetensors", "y": "one.safetensors", "z": "two.safetensors"}
    write_index(tmp_path, where)
    return tmp_path, where


def write_index(folder, where):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_shards_are_one_checkpoint(shards):
    folder, _ = shards
    for path in (folder, folder / "model.safetensors.index.json"):
        checkpoint = Checkpoint.open(path)
        assert [file.name for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]
        assert checkpoint.tensor("z").tolist() == [2.0] * 4
        assert checkpoint.tensor("x").tolist() == [1.0] * 3


def test_a_missing_shard_is_named(shards):
    folder, _ = shards
    (folder / "two.safetensors").unlink()
    open_fails(
        folder, r"names the shard two\.safetensors, which is not there; it holds 1 tensors, z among them"
    )


def test_index_and_shards_must_agree(shards):
    folder, where = shards
    write_index(folder, {**where, "w": "two.safetensors"})
    open_fails(folder, r"says that two\.safetensors holds tensor w, but it does not")
    write_index(folder, {name: file for name, file in where.items() if name != "y"})
    open_fails(folder, r"one\.safetensors holds tensor y, but the index does not name it")
    write_index(folder, {**where, "z": "one.safetensors", "y": "two.safetensors"})
    open_fails(folder, r"holds tensor y, but the index says it is in two\.safetensors")


def test_a_tensor_in_two_shards_is_refused(shards):
    folder, _ = shards
    save_file({"z": torch.zeros(4), "x": torch.ones(3)}, folder / "two.safetensors")
    open_fails(folder, r"one\.safetensors and two\.safetensors both hold tensor x")


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_a_damaged_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    open_fails(tmp_path, "not a checkpoint index")


def test_an_index_stays_in_its_folder(tmp_path):
    write_index(tmp_path, {"a": "../one.safetensors"})
    open_fails(tmp_path, r"names the shard '\.\./one\.safetensors'; expected files next to the index")


def test_a_folder_with_two_checkpoints_is_refused(shards):
    folder, _ = shards
    save_file({"x": torch.ones(3)}, folder / "model.safetensors")
    open_fails(folder, "holds both model.safetensors and model.safetensors.index.json")
