"""Packs recorded cases (case.json, expected.safetensors; of a model also config.json and model.safetensors)
into the folder `recorded` next to this file.

    python tests/golden/pack.py RECORDED_CASES_FOLDER

The weights are kept bit for bit. Of the expected tensors this keeps what `KEEP` names, so that a clone stays
small: logits, inputs and outputs of the sublayers, selections, the state of some layers before one decode
step and the result of that step. What happened to each tensor (`dropped`, `probe_rows_only`,
`significant_bits`) is added to the case.json under "packed".

File format: an xz stream of a safetensors header, followed by the payload with its bytes regrouped: all first
bytes of the tensors of one dtype, then all their second bytes, and so on (tensors in header order, dtypes in
order of first appearance). Exponents then lie next to exponents, and the stream is about 5 % shorter than
that of the plain file.
"""

from __future__ import annotations

import fnmatch
import json
import lzma
import struct
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save

CASES = ("fp32", "official-quant", "nvfp4-experts", "kernels", "sampling", "dspark-fp32")
WEIGHTS_OF = {"dspark-fp32": "fp32"}  # the case that has the weights which this one does not add

# case -> patterns of expected tensors that are kept; a pattern that ends in "@" keeps the probe rows only
KEEP = {
    "fp32": [
        "*.logits",
        "prefill.?.attn_in@",
        "prefill.?.attn_out@",
        "prefill.?.ffn_*",
        "prefill.?.x_ffn",
        "prefill.?.hc_*",
        "prefill.?.router_*",
        "prefill.?.index_sel",
        "prefill.?.index_keys",
        "prefill.?.entries",
        "prefill.hc_head@",
        "prefill.final_norm@",
        "decode.[12].*",
        "decode.?.attn_*",
        "decode.?.ffn_*",
        "decode.?.router_idx",
        "decode.?.index_sel",
    ],
    "official-quant": [
        "*.logits",
        "main.logits_weight_only@",
        "prefill.?.attn_in",
        "prefill.?.attn_out@",
        "prefill.?.ffn_*",
        "prefill.?.x_ffn",
        "prefill.?.hc_*",
        "prefill.?.router_*",
        "prefill.?.index_*",
        "prefill.?.entries",
        "prefill.?.kv",
        "prefill.?.qr",
        "prefill.?.z",
        "prefill.hc_head@",
        "prefill.final_norm@",
        "decode.1.*",
    ],
    "nvfp4-experts": [
        "*.logits",
        "*.logits_w4a4",
        "main.logits_weight_only@",
        "prefill.?.attn_in",
        "prefill.?.attn_out@",
        "prefill.?.ffn_*@",
        "prefill.?.hc_*",
        "prefill.?.router_*",
        "prefill.?.index_sel",
        "prefill.hc_head@",
        "prefill.final_norm@",
        "expert.*",
    ],
    "kernels": ["*"],
    "sampling": ["*"],
    "dspark-fp32": ["*.tokens", "*.positions", "*.confidence", "*.logits", "episode.target_logits"],
}

# Significant bits kept of f32 values; the rounding is far below the tolerance of the comparison (1e-5 and
# 5e-6 for the first, 4e-2 for the second), and random low bits are most of the bytes.
EXACT_BITS = 19
QUANTIZED_LOGITS_BITS = 11


def round_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round f32 to `bits` significant bits, halves away from zero; not for values next to overflow."""
    drop = 24 - bits
    return ((x.view(torch.int32) + (1 << (drop - 1))) & -(1 << drop)).view(torch.float32)


def significant_bits(case: str, name: str) -> int | None:
    if case in ("kernels", "sampling"):
        return None
    if case in ("fp32", "dspark-fp32") or name.endswith("logits_weight_only"):
        return EXACT_BITS
    return QUANTIZED_LOGITS_BITS if ".logits" in name else None


def select(
    case: str, tensors: dict[str, torch.Tensor], rows: list[int]
) -> tuple[dict[str, torch.Tensor], dict]:
    kept, packed = {}, {"dropped": [], "probe_rows_only": [], "significant_bits": {}}
    for name, tensor in tensors.items():
        pattern = next(
            (p for p in ("probe_rows", *KEEP[case]) if fnmatch.fnmatchcase(name, p.rstrip("@"))), None
        )
        if pattern is None:
            packed["dropped"].append(name)
            continue
        if pattern.endswith("@") and len(tensor) > len(rows):
            tensor = tensor[rows].contiguous()
            packed["probe_rows_only"].append(name)
        bits = significant_bits(case, name)
        if bits and tensor.dtype is torch.float32 and torch.isfinite(tensor).all():
            tensor = round_bits(tensor, bits)
            packed["significant_bits"][name] = bits
        kept[name] = tensor
    return kept, packed


def split_planes(file: bytes) -> bytes:
    """Regroup the payload of a safetensors file by byte position; undone by `tests.goldens`."""
    start = 8 + struct.unpack("<Q", file[:8])[0]
    header = json.loads(file[8:start])
    header.pop("__metadata__", None)
    groups: dict[str, list[bytes]] = {}
    for entry in sorted(header.values(), key=lambda e: e["data_offsets"]):
        begin, end = entry["data_offsets"]
        groups.setdefault(entry["dtype"], []).append(file[start + begin : start + end])
    planes = []
    for dtype, chunks in groups.items():
        size = 8 if dtype[-2:] == "64" else 4 if dtype[-2:] == "32" else 2 if dtype[-2:] == "16" else 1
        planes += [b"".join(chunks)[i::size] for i in range(size)]
    return file[:start] + b"".join(planes)


def compress(file: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(split_planes(file), format=lzma.FORMAT_XZ, check=lzma.CHECK_SHA256, filters=filters)


def weights(source: Path, case: str) -> bytes:
    """The model's file, less the tensors that another case has."""
    file = source / case / "model.safetensors"
    if case not in WEIGHTS_OF:
        return file.read_bytes()
    there, here = load_file(source / WEIGHTS_OF[case] / "model.safetensors"), load_file(file)
    return save({n: t for n, t in here.items() if n not in there or not torch.equal(t, there[n])})


def main(source: Path, target: Path) -> None:
    (target / "encoding").mkdir(parents=True, exist_ok=True)
    (target / "encoding" / "cases.json").write_bytes((source / "encoding" / "cases.json").read_bytes())
    for case in CASES:
        folder = target / case
        folder.mkdir(parents=True, exist_ok=True)
        description = json.loads((source / case / "case.json").read_text())
        if case in WEIGHTS_OF:
            description["weights_of"] = WEIGHTS_OF[case]
        tensors = load_file(source / case / "expected.safetensors")
        kept, description["packed"] = select(case, tensors, description.get("probe_rows", []))
        (folder / "case.json").write_text(json.dumps(description, indent=1) + "\n")
        (folder / "expected.safetensors.xz").write_bytes(compress(save(kept)))
        if (source / case / "config.json").exists():
            (folder / "config.json").write_bytes((source / case / "config.json").read_bytes())
            (folder / "model.safetensors.xz").write_bytes(compress(weights(source, case)))
        print(case, {path.name: path.stat().st_size for path in sorted(folder.iterdir())})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "recorded")
