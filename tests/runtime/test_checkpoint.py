"""Reading checkpoints: values of every storage format, every name table, and a message for every way to be
wrong.
"""

from __future__ import annotations

import json
import shutil
import struct
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4c.config import load_config
from dsv4c.errors import CheckpointError
from dsv4c.models.weights import describe, records, sources
from dsv4c.numerics.codec import Quantized, dequantize, parts_of, quantize
from dsv4c.runtime import checkpoint as checkpoints
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.parameter import ParamReader, ParamRecord, Part, Source
from dsv4c.types import (
    BF16,
    F32,
    FP8_WEIGHT,
    I32,
    MXFP4,
    NVFP4,
    QuantType,
    TensorType,
    parse_type,
)
from tests.goldens import golden_case

LAYER = "layers.1.attn"


def params(config, types=None, *, requantize=False, mtp=False):
    """Records of every parameter: as stored in the release's (or the NVFP4) names, or f32/i32 for
    types="f32".
    """
    table = "nvfp4" if config.expert_format == "nvfp4" else "release"
    wanted = []
    for name, source in sources(config, table).items():
        if name.startswith("mtp.") and not mtp:
            continue
        type = source.stored
        if name.endswith("tid2eid"):
            type = TensorType(I32, type.shape)
        elif types == "f32":
            type = TensorType(F32, type.shape)
        wanted.append((name, type, requantize))
    return [ParamRecord.from_json(json.loads(json.dumps(record))) for record in records(config, wanted)]


def own(value):
    return value.map(torch.clone) if isinstance(value, Quantized) else value.clone()


def read(folder, wanted, **options):
    values = {}
    Checkpoint.open(folder).load(wanted, lambda name, value: values.update({name: own(value)}), **options)
    return values


@pytest.mark.parametrize("run", [1, 3 << 14, 1 << 25])
def test_stacks_stream_in_the_order_of_the_disk(run, monkeypatch):
    """One by one, a few at a time, or all together."""
    monkeypatch.setattr(checkpoints, "RUN", run)
    folder = golden_case("official-quant")
    checkpoint = Checkpoint.open(folder)
    wanted = params(load_config(folder))
    whole, pieces = read(folder, wanted), []
    checkpoint.stream(wanted, lambda name, e, value: pieces.append((name, e, own(value))), workers=1)
    for name, value in whole.items():
        found = [(e, piece) for n, e, piece in pieces if n == name]
        if found[0][0] is not None:
            assert sorted(i for e, _ in found for i in e) == list(range(len(value.data)))
        for e, piece in found:
            expected = value if e is None else value.map(lambda part, e=e: part[e.start : e.stop])
            for a, b in zip(parts_of(expected).values(), parts_of(piece).values(), strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    readers = {p.name: ParamReader(checkpoint, p, p.sources["release"]) for p in wanted}
    places = [next(readers[name].entries(None if e is None else e[0])) for name, e, _ in pieces]
    assert [(p.file, p.begin) for p in places] == sorted((p.file, p.begin) for p in places)
    assert len(pieces) > len(whole) or run == 1 << 25


def release_value(tensors, name):
    """A release parameter in f32, straight from its tensors."""
    weight, scale = tensors[f"{name}.weight"], tensors.get(f"{name}.scale")
    if scale is None:
        return weight.float()
    format = MXFP4 if weight.dtype is torch.int8 else FP8_WEIGHT
    data = weight.view(torch.uint8) if format is MXFP4 else weight
    return dequantize(Quantized(format, data, scale.view(torch.uint8)))


@pytest.fixture(scope="module")
def quant():
    folder = golden_case("official-quant")
    return folder, load_config(folder), load_file(folder / "model.safetensors")


@pytest.fixture
def copy(quant, tmp_path):
    """A function that writes the quantized model with some tensors changed: None removes one."""

    def write(**changes):
        folder, _, tensors = quant
        target = tmp_path / "model"
        target.mkdir()
        shutil.copy(folder / "config.json", target)
        changed = {**tensors, **{name.replace("/", "."): value for name, value in changes.items()}}
        save_file({n: t for n, t in changed.items() if t is not None}, target / "model.safetensors")
        return target

    return write


# --- values -------------------------------------------------------------------------------------------------


def test_every_parameter_is_read_as_stored(quant):
    folder, config, tensors = quant
    values = read(folder, params(config))
    assert values.keys() == sources(config, "release").keys()
    for name, value in values.items():
        source = sources(config, "release")[name]
        assert tuple(value.shape) == source.stored.shape
    assert torch.equal(values["norm"], tensors["norm.weight"])
    for name in (f"{LAYER}.wq_a", f"{LAYER}.indexer.wq_b", "layers.2.ffn.shared_experts.w2"):
        assert torch.equal(dequantize(values[name]), release_value(tensors, name)), name
    wo_a = dequantize(values[f"{LAYER}.wo_a"])
    assert torch.equal(wo_a.flatten(0, 1), release_value(tensors, f"{LAYER}.wo_a"))
    w3 = dequantize(values["layers.2.ffn.experts.w3"])
    for e in range(config.n_routed_experts):
        assert torch.equal(w3[e], release_value(tensors, f"layers.2.ffn.experts.{e}.w3"))
    table = values["layers.0.ffn.gate.tid2eid"]
    assert table.dtype is torch.int32
    assert torch.equal(table.long(), tensors["layers.0.ffn.gate.tid2eid"])


def test_quantized_weights_become_f32_without_asking(quant):
    folder, config, tensors = quant
    values = read(folder, params(config, "f32"))
    assert torch.equal(values["layers.0.attn.wq_b"], release_value(tensors, "layers.0.attn.wq_b"))
    stack = values["layers.1.ffn.experts.w2"]
    assert torch.equal(stack[5], release_value(tensors, "layers.1.ffn.experts.5.w2"))


def test_nvfp4_stacks_have_a_global_scale_per_expert():
    folder = golden_case("nvfp4-experts")
    config, tensors = load_config(folder), load_file(folder / "model.safetensors")
    wanted = params(config)
    values = read(folder, wanted)
    value, prefix = values["layers.2.ffn.experts.w3"], "layers.2.ffn.experts"
    assert value.format == NVFP4
    for e in range(config.n_routed_experts):
        assert torch.equal(value.data[e], tensors[f"{prefix}.{e}.w3.weight"])
        assert torch.equal(value.scale[e].float(), tensors[f"{prefix}.{e}.w3.weight_scale"].float())
        assert value.global_scale[e] == tensors[f"{prefix}.{e}.w3.weight_scale_2"]
        assert values[f"{prefix}.w2.input_scale"][e] == tensors[f"{prefix}.{e}.w2.input_scale"]
    # Without activation scales nothing is unexpected either: they belong to the weights' description.
    assert Checkpoint.open(folder).check([p for p in wanted if "input_scale" not in p.name]).complete


def test_a_recast_that_rounds_nothing_is_done_and_another_is_refused():
    folder = golden_case("nvfp4-experts")  # layers 0 and 1 were recast from MXFP4, layer 2 was not
    config = load_config(folder)
    good, bad = "layers.0.ffn.experts.w1", "layers.2.ffn.experts.w1"
    exact = [replace_type(p, MXFP4) if p.name == good else p for p in params(config)]
    values = read(folder, exact)
    assert values[good].format == MXFP4
    assert torch.equal(dequantize(values[good]), dequantize(read(folder, params(config))[good]))
    rounding = [replace_type(p, MXFP4) if p.name == bad else p for p in params(config)]
    message = (
        rf"{bad.replace('w1', '0.w1')}.weight cannot become parameter {bad}.*q\[e2m1,e4m3.*q\[e2m1,ue8m0"
    )
    with pytest.raises(CheckpointError, match=message):
        read(folder, rounding)
    allowed = [replace(p, requantize=True) if p.name == bad else p for p in rounding]
    assert read(folder, allowed)[bad].format == MXFP4


def replace_type(param, format):
    return replace(param, type=QuantType(format, param.type.shape))


def test_bf16_weights_are_quantized_only_on_request():
    folder = golden_case("fp32")
    config = load_config(folder)
    name = "layers.1.attn.compressor.wkv"
    wanted = [replace_type(p, FP8_WEIGHT) if p.name == name else p for p in params(config)]
    with pytest.raises(CheckpointError, match=rf"{name}.weight cannot become parameter {name}: .*bf16"):
        read(folder, wanted)
    values = read(folder, [replace(p, requantize=p.name == name) for p in wanted])
    expected = quantize(load_file(folder / "model.safetensors")[f"{name}.weight"].float(), FP8_WEIGHT)
    assert torch.equal(values[name].scale, expected.scale)
    assert torch.equal(values[name].data.view(torch.uint8), expected.data.view(torch.uint8))


def to_transformers(tensors, config, table):
    """The quantized release model in the names that transformers saves."""
    result = {}
    release = sources(config, "release")
    for name, source in sources(config, table).items():
        for role, part in source.parts.items():
            old = release[name].parts[role]
            if source.stack or not release[name].stack:
                result.update(
                    {
                        n: tensors[o]
                        for n, o in zip(part.names(source.stack), old.names(source.stack), strict=True)
                    }
                )
                continue
            stack = torch.stack([tensors[n].view(torch.uint8) for n in old.names(release[name].stack)])
            stack = stack.view(tensors[old.names(1)[0]].dtype)
            if source.rows:
                held = result.setdefault(part.tensor, torch.empty(part.shape, dtype=stack.dtype))
                size = stack.shape[1]
                start = 0 if source.rows[0] == 0 else size
                held.view(torch.uint8)[:, start : start + size] = stack.view(torch.uint8)
            else:
                result[part.tensor] = stack
    return result


@pytest.mark.parametrize("table", ["transformers", "transformers-split"])
@pytest.mark.parametrize("scales", ["F8_E8M0", "F32"])
def test_transformers_names_give_the_same_values(quant, tmp_path, table, scales):
    folder, config, tensors = quant
    renamed = to_transformers(tensors, config, table)
    if scales == "F32":
        renamed = {n: t.float() if t.dtype is torch.float8_e8m0fnu else t for n, t in renamed.items()}
    save_file({n: t.contiguous() for n, t in renamed.items()}, tmp_path / "model.safetensors")
    wanted = params(config)
    assert Checkpoint.open(tmp_path).table(wanted) == table
    expected, values = read(folder, wanted), read(tmp_path, wanted)
    for name, value in expected.items():
        other = values[name]
        quantized = isinstance(value, Quantized)
        for a, b in zip(value.parts, other.parts, strict=True) if quantized else [(value, other)]:
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), name


def test_scales_that_are_no_powers_of_two_need_permission(quant, copy):
    _, config, tensors = quant
    name = f"{LAYER}.wq_a"
    folder = copy(**{f"{name}.scale": tensors[f"{name}.scale"].float() * 1.5})
    with pytest.raises(CheckpointError, match=rf"{name}.weight cannot become .*q\[e4m3,f32,128x128\]"):
        read(folder, params(config))
    values = read(folder, [replace(p, requantize=p.name == name) for p in params(config)])
    assert values[name].format == FP8_WEIGHT


def test_what_save_pretrained_writes_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    case = golden_case("fp32")
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(case)
    expected = read(case, params(load_config(case), "f32"))
    for original in (False, True):
        folder = tmp_path / str(original)
        model.save_pretrained(folder, save_original_format=original)
        values = read(folder, params(load_config(case), "f32"))
        for name, value in expected.items():
            assert torch.equal(values[name].float(), value.float()), name


@pytest.mark.parametrize(("rows", "tiles"), [(256, [[0, 1], [2, 3]]), (64, [[0], [0]]), (128, [[0], [1]])])
def test_groups_take_their_own_scale_tiles(tmp_path, rows, tiles):
    groups, width = 2, 128
    weight = quantize(torch.randn(groups * rows, width), FP8_WEIGHT)
    save_file({"w.weight": weight.data, "w.scale": weight.scale}, tmp_path / "model.safetensors")
    type = QuantType(FP8_WEIGHT, (groups, rows, width))
    parts = {
        "data": Part("w.weight", ("F8_E4M3",), (groups * rows, width)),
        "scale": Part("w.scale", ("U8",), tuple(weight.scale.shape)),
    }
    value = read(tmp_path, [ParamRecord("w", type, {"release": Source(type, parts)})])["w"]
    assert torch.equal(value.scale, weight.scale[torch.tensor(tiles)])
    assert torch.equal(dequantize(value).flatten(0, 1), dequantize(weight))


def test_groups_that_cut_scale_tiles_are_refused(tmp_path):
    weight = quantize(torch.randn(192, 128), FP8_WEIGHT)
    save_file({"w.weight": weight.data, "w.scale": weight.scale}, tmp_path / "model.safetensors")
    type = QuantType(FP8_WEIGHT, (2, 96, 128))
    parts = {"data": Part("w.weight", ("F8_E4M3",), (192, 128)), "scale": Part("w.scale", ("U8",), (2, 1))}
    with pytest.raises(
        CheckpointError, match="tiles of 128 rows, which do not line up with 2 groups of 96 rows"
    ):
        read(tmp_path, [ParamRecord("w", type, {"release": Source(type, parts)})])


def test_a_merged_stack_whose_tiles_straddle_w1_and_w3_is_refused(tmp_path):
    stack = quantize(torch.randn(2, 128, 128), FP8_WEIGHT)
    save_file({"up": stack.data, "up_scale_inv": stack.scale}, tmp_path / "model.safetensors")
    type = QuantType(FP8_WEIGHT, (2, 64, 128))
    parts = {
        "data": Part("up", ("F8_E4M3",), (2, 128, 128)),
        "scale": Part("up_scale_inv", ("U8",), (2, 1, 1)),
    }
    source = Source(type, parts, rows=(0, 64))
    with pytest.raises(CheckpointError, match=r"blocks of 128 rows that straddle w1 and w3, .* at row 64"):
        read(tmp_path, [ParamRecord("w1", type, {"transformers": source})])


def test_unaligned_tensors_are_read(tmp_path):
    payload = b"\x01" + struct.pack("<2f", 1.5, -2.0)
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + payload)
    assert Checkpoint.open(tmp_path / "odd.safetensors").tensor("b").tolist() == [1.5, -2.0]


# --- loading ------------------------------------------------------------------------------------------------


def test_load_reports_progress_and_calls_the_sink_once_per_parameter(quant):
    folder, config, _ = quant
    wanted, seen, names = params(config), [], []
    checkpoint = Checkpoint.open(folder)
    checkpoint.load(
        wanted,
        lambda name, value: names.append((name, threading.current_thread().name)),
        workers=3,
        progress=lambda name, done, total: seen.append((done, total)),
    )
    assert sorted(name for name, _ in names) == sorted(p.name for p in wanted)
    assert all(thread.startswith("dsv4c-weights") for _, thread in names)
    total = sum(entry.nbytes for entry in checkpoint.tensors.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


def test_an_error_in_the_sink_stops_the_load(quant):
    folder, config, _ = quant
    calls = []

    def sink(name, value):
        calls.append(name)
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        Checkpoint.open(folder).load(params(config), sink, workers=1)
    assert len(calls) < 5


def test_a_mapping_survives_released_pages(quant):
    folder, _, tensors = quant
    checkpoint = Checkpoint.open(folder)
    view = checkpoint.tensor("embed.weight")
    checkpoint.release(checkpoint.tensors["embed.weight"])
    assert torch.equal(view, tensors["embed.weight"])


def test_mtp_is_ignored_only_when_it_is_not_needed():
    folder = golden_case("fp32")
    config = load_config(folder)
    checkpoint = Checkpoint.open(folder)
    report = checkpoint.check(params(config))
    assert report.complete
    assert report.ignored == {"mtp.": 47}
    assert "47 tensors mtp.* ignored: not needed" in str(report)
    whole = checkpoint.check(params(config, mtp=True))
    assert whole.complete
    assert whole.ignored == {}
    partly = checkpoint.check([p for p in params(config, mtp=True) if p.name != "mtp.0.enorm"])
    assert partly.unexpected == ["mtp.0.enorm.weight"]
    assert checkpoint.check(params(config)[:1], ignore=("",)).complete


# --- headers that do not fit --------------------------------------------------------------------------------


def check_fails(folder, config, *patterns):
    with pytest.raises(CheckpointError) as error:
        read(folder, params(config))
    message = str(error.value)
    assert message.startswith(str(folder))
    for pattern in patterns:
        assert pattern in message, message
    assert error.value.exit_code == 4


def test_a_missing_tensor_is_named(quant, copy):
    folder = copy(**{f"{LAYER}.wkv.scale": None, "norm.weight": None})
    check_fails(folder, quant[1], "does not fit", "2 tensors missing: ", f"{LAYER}.wkv.scale", "norm.weight")


def test_an_extra_tensor_is_named(quant, copy):
    extra = {f"layers.7.attn.extra{i}": torch.zeros(2) for i in range(7)}
    check_fails(copy(**extra), quant[1], "7 tensors unexpected: layers.7.attn.extra0", "; and 2 more")


def test_a_misshapen_tensor_is_named_with_both_shapes(quant, copy):
    folder = copy(**{f"{LAYER}.wkv.weight": torch.zeros(256, 512).to(torch.float8_e4m3fn)})
    check_fails(
        folder,
        quant[1],
        "1 tensors of another shape: "
        f"{LAYER}.wkv.weight in model.safetensors is [256, 512], expected [512, 256]",
    )


def test_a_mistyped_tensor_is_named_with_both_types(quant, copy):
    folder = copy(**{"layers.2.ffn.gate.weight": torch.zeros(8, 256, dtype=torch.float16)})
    check_fails(
        folder,
        quant[1],
        "layers.2.ffn.gate.weight in model.safetensors is F16, expected BF16 or F32",
        "re-export",
    )


def test_nothing_is_read_before_all_headers_fit(quant, copy, monkeypatch):
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("payload was read"))
    check_fails(copy(**{"norm.weight": None}), quant[1], "norm.weight")


def test_the_checkpoint_of_another_model_is_recognized(quant):
    config = replace(quant[1], hidden_size=512, o_lora_rank=256, moe_intermediate_size=256)
    with pytest.raises(
        CheckpointError, match=r"does not fit the model[\s\S]*the checkpoint of another model"
    ):
        read(quant[0], params(config))


def test_a_foreign_model_shows_names_of_both_sides(quant, tmp_path):
    save_file({"bert.embeddings": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds none of the tensors needed; found bert\.embeddings; expected"
    ):
        read(tmp_path, params(quant[1]))


def test_a_table_without_the_parameter_is_an_error(quant, tmp_path):
    _, config, tensors = quant
    save_file(to_transformers(tensors, config, "transformers"), tmp_path / "model.safetensors")
    extra = ParamRecord.from_json(
        {
            "name": "mtp.0.enorm",
            "type": "bf16[256]",
            "sources": {
                "release": {"stored": "bf16[256]", "parts": {"data": ["mtp.0.enorm.weight", "BF16", [256]]}}
            },
        }
    )
    message = (
        r"transformers names, which have no tensor for mtp\.0\.enorm; give a checkpoint in release names"
    )
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, [*params(config), extra])


def test_a_checkpoint_in_two_spellings_is_refused(quant, tmp_path):
    _, config, tensors = quant
    both = {**to_transformers(tensors, config, "transformers-split"), **tensors}
    save_file({name: tensor.clone() for name, tensor in both.items()}, tmp_path / "model.safetensors")
    wanted = [p for p in params(config) if p.name.startswith("layers.")]
    with pytest.raises(
        CheckpointError, match=r"two spellings equally well, release .* and transformers-split"
    ):
        read(tmp_path, wanted)


# --- payload that is wrong ----------------------------------------------------------------------------------


def poison(tensor, index, byte=None):
    tensor = tensor.clone()
    if byte is None:
        tensor[index] = float("nan")
    else:
        tensor.view(torch.uint8)[index] = byte
    return tensor


@pytest.mark.parametrize(
    ("name", "index", "byte"),
    [
        ("embed.weight", (3, 5), None),
        ("layers.0.hc_attn_fn", (23, 1000), None),
        (f"{LAYER}.wq_a.weight", (2, 7), 0x7F),
        (f"{LAYER}.wq_b.weight", (2000, 1), 0xFF),
        (f"{LAYER}.wo_b.scale", (1, 0), 0xFF),
        ("layers.2.ffn.experts.5.w2.scale", (4, 3), 0xFF),
    ],
)
def test_nan_weights_are_named_with_their_place(quant, copy, name, index, byte):
    folder = copy(**{name: poison(quant[2][name], index, byte)})
    message = (
        rf"model\.safetensors: tensor {name} is not finite \(NaN or infinity\) at \[{index[0]}, {index[1]}\]"
    )
    with pytest.raises(CheckpointError, match=message):
        read(folder, params(quant[1]))


def test_infinite_weights_are_refused(quant, copy):
    gate = quant[2]["layers.2.ffn.gate.bias"].clone()
    gate[4] = float("-inf")
    with pytest.raises(CheckpointError, match=r"tensor layers\.2\.ffn\.gate\.bias is not finite .* at \[4\]"):
        read(copy(**{"layers.2.ffn.gate.bias": gate}), params(quant[1]))


EXPERT, LINEAR = "layers.2.ffn.experts.5.w2", f"{LAYER}.wo_b"


@pytest.mark.parametrize(
    ("name", "index", "value", "found"),
    [
        (f"{LINEAR}.scale", (1, 0), -0.25, r"is -0\.25 at \[1, 0\]; expected positive"),
        (f"{LINEAR}.scale", (0, 1), 0.0, r"is 0 at \[0, 1\] over weights that are not; expected positive"),
        (f"{LINEAR}.scale", (1, 0), float("inf"), r"is not finite \(NaN or infinity\) at \[1, 0\]"),
        (f"{LINEAR}.scale", (1, 0), 1e30, r"is at most 1e\+30, which scales no weight"),
        (f"{LINEAR}.scale", (..., slice(None)), 1e-30, r"is at most 1e-30, which scales no weight"),
        (f"{EXPERT}.scale", (4, 3), -1.0, r"is -1 at \[4, 3\]; expected positive"),
    ],
)
def test_a_scale_that_cannot_be_right_is_named(quant, copy, name, index, value, found):
    scale = quant[2][name].float()
    scale[index] = value
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name} {found}"):
        read(copy(**{name: scale}), params(quant[1]))


def test_a_scale_in_bytes_is_judged_by_its_power_of_two(quant, copy):
    scale = poison(quant[2][f"{EXPERT}.scale"], (4, 3), byte=254)
    with pytest.raises(CheckpointError, match=rf"{EXPERT}\.scale is at most 1\.7e\+38, which scales no"):
        read(copy(**{f"{EXPERT}.scale": scale}), params(quant[1]))


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_2", "input_scale"])
def test_every_nvfp4_scale_must_be_positive(tmp_path, part, value):
    case = golden_case("nvfp4-experts")
    tensors, name = load_file(case / "model.safetensors"), f"layers.0.ffn.experts.3.w2.{part}"
    tensors[name] = torch.full_like(tensors[name].float(), value).to(tensors[name].dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint, config = Checkpoint.open(tmp_path), load_config(case)
    (told,) = describe(checkpoint, config)["unsound"]
    assert f"model.safetensors: tensor {name} is {value:g}" in told
    assert not describe(checkpoint, config)["complete"]
    with pytest.raises(CheckpointError, match=rf"tensor {name} is {value:g}"):
        checkpoint.load(params(config), lambda *_: pytest.fail("a weight was read"))


def test_a_zero_scale_over_zeros_is_right(quant, copy):
    data, scale = quant[2][f"{LINEAR}.weight"].clone(), quant[2][f"{LINEAR}.scale"].float()
    data.view(torch.uint8)[:128, :128] = 0x80  # -0
    scale[0, 0] = 0.0
    folder = copy(**{f"{LINEAR}.weight": data, f"{LINEAR}.scale": scale})
    value = dequantize(read(folder, [replace(p, requantize=True) for p in params(quant[1])])[LINEAR])
    assert not value[:128, :128].any()


def test_all_wrong_scales_are_counted(quant, copy):
    names = [f"{LINEAR}.scale", f"{LAYER}.wq_a.scale"]
    folder = copy(**{name: -quant[2][name].float() for name in names})
    with pytest.raises(CheckpointError, match=r"and 1 more scales$"):
        read(folder, params(quant[1]))


# --- other dtypes for the same numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "store"),
    [
        (f"{EXPERT}.scale", lambda t: t.view(torch.uint8)),
        (f"{EXPERT}.scale", lambda t: t.float()),
        (f"{EXPERT}.weight", lambda t: t.view(torch.uint8)),
        (f"{LINEAR}.scale", lambda t: t.view(torch.uint8)),
        ("layers.0.ffn.gate.tid2eid", lambda t: t.to(torch.int32)),
        ("norm.weight", lambda t: t.float()),
    ],
    ids=["ue8m0 in U8", "ue8m0 in F32", "FP4 in U8", "FP8's scale in U8", "expert ids in I32", "bf16 in F32"],
)
def test_a_dtype_that_loses_nothing_is_read_as_the_usual_one(quant, copy, name, store):
    parameter = name.rpartition(".")[0].replace(".5.", ".") if "experts" in name else name
    parameter = parameter.removesuffix(".scale").removesuffix(".weight")
    wanted = [p for p in params(quant[1]) if p.name == parameter]
    expected = read(quant[0], wanted, ignore=("",))[parameter]
    found = read(copy(**{name: store(quant[2][name])}), wanted, ignore=("",))[parameter]
    quantized = isinstance(expected, Quantized)
    for a, b in zip(expected.parts, found.parts, strict=True) if quantized else [(expected, found)]:
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_wider_dtype_that_holds_more_is_refused(quant, copy):
    folder = copy(**{"norm.weight": quant[2]["norm.weight"].float() + 1e-6})
    with pytest.raises(CheckpointError, match=r"norm\.weight cannot become parameter norm: .* without round"):
        read(folder, params(quant[1]))


@pytest.mark.parametrize("expert", [8, -1])
def test_a_hash_table_that_names_no_expert_is_refused(quant, copy, expert):
    table = quant[2]["layers.0.ffn.gate.tid2eid"].clone()
    table[17, 1] = expert
    with pytest.raises(
        CheckpointError, match=rf"gate\.tid2eid holds {expert}; expected expert numbers from 0 to 7"
    ):
        read(copy(**{"layers.0.ffn.gate.tid2eid": table}), params(quant[1]))


def test_activation_scales_that_should_agree_must_agree(tmp_path):
    case = golden_case("nvfp4-experts")
    tensors, name = load_file(case / "model.safetensors"), "layers.1.ffn.experts.6.w3.input_scale"
    save_file({**tensors, name: tensors[name] * 2}, tmp_path / "model.safetensors")
    message = (
        r"experts\.6\.w1\.input_scale is .*, but layers\.1\.ffn\.experts\.6\.w3\.input_scale is .*one value"
    )
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, params(load_config(case)))


def test_a_plan_record_that_makes_no_sense_is_refused():
    with pytest.raises(CheckpointError, match="weight record 'x' cannot be read"):
        ParamRecord.from_json({"name": "x", "type": "bf17[2]", "sources": {}})
    with pytest.raises(CheckpointError, match=r"weight record '\?'"):
        ParamRecord.from_json({})
    assert ParamRecord.from_json({"name": "x", "type": "bf16[2]", "sources": {}}).type == parse_type(
        "bf16[2]"
    )
    assert parse_type("bf16[2]") == TensorType(BF16, (2,))


def test_a_file_that_changes_while_open_is_noticed(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(300)}, file)
    checkpoint = Checkpoint.open(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="changed while it was open"):
        checkpoint.tensor("x")
