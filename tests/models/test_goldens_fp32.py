"""The unquantized model against recorded results of the official implementation, everything in f32."""

from __future__ import annotations

import fnmatch

import pytest
import torch

from tests.goldens import Recorded, recorded
from tests.interpreted import STATES, Model, layer_value, logits_of, padded, recorded_slots

WHOLE = -1  # the prompt in one call


@pytest.fixture(scope="module")
def case() -> Recorded:
    return recorded("fp32")


@pytest.mark.parametrize(
    ("run", "chunk"),
    [
        ("main", WHOLE),
        ("main", 37),
        ("main", 5),
        ("main", 0),
        ("short", WHOLE),
        ("short", 2),
        ("one", WHOLE),
        ("p128", WHOLE),
        ("p128", 127),
        ("p128", 9),
        ("p128", 8),
        ("short", 3),
    ],
)
def test_logits(case: Recorded, run: str, chunk: int) -> None:
    ids = case.run(run)
    logits = logits_of(case.folder, "fp32", ids, ids.prefill if chunk == WHOLE else chunk)
    assert logits.shape == (len(ids.ids), 256)
    assert case.distances(f"{run}.logits", logits).max() <= case.tolerance["logits_rel_l2_per_position"]


def test_every_intermediate_of_the_prefill(case: Recorded) -> None:
    run = case.run()
    model = Model(case.folder, "fp32", run.prefill)
    graph = model.graph("prefill")
    names = [n.removeprefix("prefill.") for n in case.tensors if fnmatch.fnmatchcase(n, "prefill.?.*")]
    places = {n: layer_value(graph, int(n[0]), n[2:]) for n in names}
    ends = {"hc_head": "output.hc_head", "final_norm": "output.final_norm"}
    watch = {*places.values(), *ends.values()}
    values = model.call("prefill", padded(run.ids[: run.prefill], run.prefill), watch)
    bound = case.tolerance["intermediates_rel_l2"]
    compared = set()
    for layer in range(4):
        of_layer = {n[2:]: values[place] for n, place in places.items() if n.startswith(f"{layer}.")}
        for name in of_layer:
            assert case.deviation(f"prefill.{layer}", name, of_layer) <= bound, f"layer {layer}: {name}"
            compared.add(f"prefill.{layer}.{name}")
    for name, place in ends.items():
        assert case.distance(f"prefill.{name}", values[place]) <= bound
        compared.add(f"prefill.{name}")
    assert compared >= {n for n in case.packed_names if n.startswith("prefill.")}
    assert len(compared) >= 60


def test_one_decode_step_from_the_recorded_state(case: Recorded) -> None:
    """Layers whose state is recorded start from it, and it is what ours had come to."""
    run, position = case.run(), case.description["decode_probe_position"]
    model = Model(case.folder, "fp32", 64)
    model.prefill(run.ids[:position])
    bound = case.tolerance["intermediates_rel_l2"]
    compared = set()
    for full in (n for n in case.tensors if fnmatch.fnmatchcase(n, "decode.?.state.*")):
        layer, name, expected = full[7], full.rpartition(".")[2], case.tensors[full]
        state = model.states[f"layers.{layer}.{STATES[name]}"][0]
        slots = recorded_slots(name, len(expected), position)
        theirs = expected[[row for row, _ in slots]]
        ours = [token % len(state) for _, token in slots]
        assert (state[ours].double() - theirs.double()).norm() <= bound * theirs.double().norm(), full
        state.fill_(torch.nan)
        state[ours] = theirs
        compared.add(full)
    graph = model.graph("decode")
    recorded_values = [n for n in case.tensors if fnmatch.fnmatchcase(n, "decode.?.*") and ".state." not in n]
    places = {n: layer_value(graph, int(n[7]), n[9:]) for n in recorded_values}
    values = model.call("decode", padded([run.ids[position]], 1), set(places.values()))
    for layer in range(4):
        of_layer = {n[9:]: values[p] for n, p in places.items() if n.startswith(f"decode.{layer}.")}
        for name in of_layer:
            assert case.deviation(f"decode.{layer}", name, of_layer) <= bound, f"layer {layer}: {name}"
            compared.add(f"decode.{layer}.{name}")
    expected = case.tensors["main.logits"][position].double()
    distance = (values["logits"][0].double() - expected).norm() / expected.norm()
    assert distance <= case.tolerance["logits_rel_l2_per_position"]
    assert compared >= {n for n in case.packed_names if n.startswith("decode.")}
    assert sum(".state." in n for n in compared) >= 11


@pytest.mark.parametrize("chunk", [41, 5])
def test_the_drafts_of_the_mtp_block(case: Recorded, chunk: int) -> None:
    """Behind tokens all over the prompt: the first, some whose window is not full yet, and later ones."""
    run, recorded_drafts = case.run(), case.tensors["mtp.logits"].double()
    model = Model(case.folder, "fp32", chunk)
    held = 0
    for place in (1, 2, 9, 60, 127, 128, 129, 140, 141, run.prefill):
        model.prefill(run.ids[held:place])
        held = place
        expected = recorded_drafts[place - 1]
        found = model.draft(run.ids[place])["logits"][0].double()
        distance = (found - expected).norm() / expected.norm()
        assert distance <= case.tolerance["logits_rel_l2_per_position"], place
