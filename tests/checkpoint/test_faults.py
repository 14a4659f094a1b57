"""Damaged and ill-fitting checkpoints: each is one clear ModelError, before anything is allocated."""

import json
import struct
from dataclasses import dataclass

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

from moe_prefill.checkpoint import (
    load_slots,
    open_checkpoint,
    pinned_revision,
    read_config,
    resolve,
    resolve_directory,
)
from moe_prefill.checkpoint.loader import audit
from moe_prefill.errors import ModelError, UsageError


@dataclass
class At:
    slot: str
    row: int = 0
    rows: int | None = None
    expert: int | None = None
    parts: int = 1


SHAPES = {"pair": (4, 2), "bank": (2, 3, 2)}
PLACES = {
    "a": At("pair", 0, 1),
    "b": At("pair", 1, 3),
    "e.0": At("bank", expert=0),
    "e.1": At("bank", expert=1),
    "fused": At("bank"),
}
TENSORS = {
    "a": torch.tensor([[1.0, 2.0]]),
    "b": torch.arange(6.0).view(3, 2),
    "e.0": torch.full((3, 2), 5.0),
    "e.1": torch.full((3, 2), 6.0),
}
REQUIRED = [(name, place) for name, place in PLACES.items() if name != "fused"]


def write(directory, tensors=None):
    save_file(TENSORS if tensors is None else tensors, directory / "model.safetensors")
    return directory / "model.safetensors"


def load(directory, **options):
    def allocate(slot, shape):
        return torch.full(shape, float("nan"))

    return load_slots(open_checkpoint(directory), SHAPES, PLACES.get, REQUIRED, allocate, **options)


def refuse(directory, *texts):
    with pytest.raises(ModelError) as met:
        load(directory)
    for text in texts:
        assert text in str(met.value)


def test_loads(tmp_path):
    write(tmp_path)
    slots = load(tmp_path)
    assert slots["pair"].tolist() == [[1, 2], [0, 1], [2, 3], [4, 5]]
    assert slots["bank"].mean((1, 2)).tolist() == [5, 6]


def test_keeps_rows_of_any_slot(tmp_path):
    write(tmp_path)
    slots = load(tmp_path, keep=lambda slot, shape: range(2) if slot == "pair" else range(0))
    assert slots.keys() == {"pair"}
    assert slots["pair"].tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("bounce", [1, 8, 20, 1 << 20])
def test_converts_through_a_small_buffer(tmp_path, monkeypatch, bounce):
    monkeypatch.setattr("moe_prefill.checkpoint.reader.BOUNCE_BYTES", bounce)
    write(tmp_path, {name: tensor.to(torch.bfloat16) for name, tensor in TENSORS.items()})
    assert load(tmp_path)["pair"].tolist() == [[1, 2], [0, 1], [2, 3], [4, 5]]


def test_missing_left_over_misshapen_and_mistyped(tmp_path):
    extra = {"c": torch.ones(1), "a": torch.ones(2, 2), "e.0": torch.ones(3, 2, dtype=torch.int32)}
    write(tmp_path, {name: tensor for name, tensor in TENSORS.items() if name != "e.1"} | extra)
    refuse(
        tmp_path,
        str(tmp_path),
        "Tensors left over (1): c.",
        "Tensors of the wrong shape (1): a is [2, 2] where config.json needs [1, 2].",
        "Tensors of the wrong type (1): e.0 is I32",
        "Tensors missing (1): e.1.",
    )


def test_names_a_few_and_counts_the_rest(tmp_path):
    write(tmp_path, TENSORS | {f"x{i}": torch.ones(1) for i in range(9)})
    refuse(tmp_path, "Tensors left over (9): x0; x1; x2; x3; x4 and 4 more.")


def test_an_expert_given_twice(tmp_path):
    write(tmp_path, TENSORS | {"fused": torch.ones(2, 3, 2)})
    refuse(tmp_path, "Tensors given twice (2): e.0; e.1.")


def test_ignored_names_pass(tmp_path):
    write(tmp_path, TENSORS | {"c": torch.ones(1)})
    placed = audit(open_checkpoint(tmp_path), SHAPES, PLACES.get, REQUIRED, lambda name: name == "c")
    assert placed.keys() == TENSORS.keys()


@pytest.mark.parametrize("cut", [1, 17, 60])
def test_truncated_file(tmp_path, cut):
    path = write(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    refuse(tmp_path, str(path), "truncated", f"{len(data) - cut:,} bytes", f"needs {len(data):,}")


def test_file_with_a_tail(tmp_path):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes() + b"x")
    refuse(tmp_path, str(path), "longer than its header says")


def raw(directory, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensor(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "text"),
    [
        (b"{not json", b"", "not JSON"),
        (b"\xff\xfe{}", b"", "not JSON"),
        (b"[]", b"", "not an object"),
        ({"a": 1}, b"", "describes tensor a as 1"),
        ({"a": tensor(0, 8)}, b"x" * 8, "needs 4 bytes and has 8"),
        ({"a": tensor(0, 4, (-1,))}, b"x" * 4, "shape [-1]"),
        ({"a": tensor(0, 4, dtype="F99")}, b"x" * 4, "type 'F99'"),
        ({"a": tensor(0, 4), "b": tensor(2, 6)}, b"x" * 6, "tensor b begins at byte"),
        ({"a": tensor(0, 4), "b": tensor(8, 12)}, b"x" * 12, "tensor b begins at byte"),
    ],
)
def test_damaged_header(tmp_path, header, data, text):
    raw(tmp_path, header, data)
    refuse(tmp_path, str(tmp_path / "model.safetensors"), text)


@pytest.mark.parametrize("data", [b"", b"123", b"\xff" * 30, b"\x00" * 30])
def test_not_a_safetensors_file(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    refuse(tmp_path, "is damaged: its header is said to take")


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuse(tmp_path, "is a Git LFS pointer, not the file; fetch it with `git lfs pull`")


def shards(directory, weight_map):
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, directory / "model-1.safetensors")
    save_file({"e.0": TENSORS["e.0"], "e.1": TENSORS["e.1"]}, directory / "model-2.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


GOOD = {"a": "model-1.safetensors", "b": "model-1.safetensors"} | dict.fromkeys(["e.0", "e.1"], "model-2.safetensors")


def test_sharded(tmp_path):
    shards(tmp_path, GOOD)
    assert load(tmp_path)["bank"].mean((1, 2)).tolist() == [5, 6]


def test_missing_shard(tmp_path):
    shards(tmp_path, GOOD)
    (tmp_path / "model-2.safetensors").unlink()
    refuse(tmp_path, "1 of 2 shards are missing, first model-2.safetensors")


def test_index_that_promises_too_much(tmp_path):
    shards(tmp_path, GOOD | {"z": "model-1.safetensors"})
    refuse(tmp_path, "lists 1 tensors that are not in the file it names, first z in model-1.safetensors")


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_bad_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refuse(tmp_path, "model.safetensors.index.json")


def test_tensor_in_two_shards(tmp_path):
    shards(tmp_path, GOOD)
    save_file({"a": TENSORS["a"]} | {"e.0": TENSORS["e.0"], "e.1": TENSORS["e.1"]}, tmp_path / "model-2.safetensors")
    refuse(tmp_path, "tensor a is in two files")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("pytorch_model.bin", "pickle files"),
        ("adapter_config.json", "only an adapter"),
        ("other.safetensors", "it holds other.safetensors"),
        (None, "it holds no files"),
    ],
)
def test_no_weights(tmp_path, file, text):
    if file:
        (tmp_path / file).write_text("")
    refuse(tmp_path, "has neither model.safetensors nor model.safetensors.index.json", text)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_bad_config(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_directories_need_no_hub(tmp_path):
    assert resolve_directory(tmp_path) == tmp_path
    with pytest.raises(ModelError, match=r"no directory .*absent"):
        resolve_directory(tmp_path / "absent")
    write(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        resolve_directory(tmp_path / "model.safetensors")


def test_revisions_belong_to_the_hub(monkeypatch, tmp_path):
    asked = []
    snapshot = tmp_path / "models--some--model/snapshots/0a1b2c"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(
        resolve, "snapshot_download", lambda name, **options: asked.append(options["revision"]) or str(snapshot)
    )
    assert resolve_directory("some/model", revision="v2") == snapshot
    assert pinned_revision("some/model", "v2") == "0a1b2c"
    assert pinned_revision("some/model", None) == "0a1b2c"
    assert asked == ["v2", "v2", None]
    assert pinned_revision(snapshot, None) is None  # a local directory, wherever it lies
    with pytest.raises(UsageError, match=r"--revision v2: .* is a local directory"):
        resolve_directory(tmp_path, revision="v2")


def hub_error(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "server says no")
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (hub_error(hub_errors.GatedRepoError), "asks for permission to download some/model"),
        (hub_error(hub_errors.RepositoryNotFoundError), "no public model some/model"),
        (hub_error(hub_errors.RevisionNotFoundError), "has no revision 'main'"),
        (hub_error(hub_errors.LocalEntryNotFoundError), "not in the hub's local cache"),
        (hub_error(hub_errors.OfflineModeIsEnabled), "Connect to the network"),
        (ConnectionError("unreachable"), "cannot be reached (unreachable)"),
    ],
)
def test_hub_errors(monkeypatch, error, text):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(resolve, "snapshot_download", fail)
    with pytest.raises(ModelError) as met:
        resolve_directory("some/model", revision="main")
    assert text in str(met.value)


def test_hub_download_asks_for_needed_files_only(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(resolve, "snapshot_download", lambda name, **options: asked.update(options) or str(tmp_path))
    assert resolve_directory("some/model") == tmp_path
    assert "model-*.safetensors" in asked["allow_patterns"]
    resolve_directory("some/model", weights=False)
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])
