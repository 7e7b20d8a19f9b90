"""The page's tables are made from the figures beside them."""

import json
import pathlib

import pytest

from benchmarks import loop, pods, steps, tables

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results"


def test_the_page_is_made_from_the_figures():
    summary = json.loads((RESULTS / "bench.json").read_text())
    assert (RESULTS / "bench.md").read_text() == tables.page(summary)


@pytest.mark.parametrize("part", tables.PARTS)
def test_parts_not_measured_have_no_table(part):
    assert tables.PARTS[part]({}) == ""


def test_pods_are_named_by_topology_and_k_or_method():
    assert pods.PODS["v5e_16x16_k32"] == pods.Pod("16x16", 32)
    assert pods.PODS["v5e_4x4_coherent"] == pods.Pod("4x4", 16, "coherent")


def test_the_ratios_have_the_names_that_others_look_for():
    summary = json.loads((RESULTS / "bench.json").read_text())
    for name in ("streaming_vs_accumulate", "stacked_vs_accumulate", "coherent_of_plain"):
        assert set(summary[name]) == set(steps.CASES)
    assert {"v5e_4x4_k8", "v5e_4x4_coherent"} <= set(summary["pod_traffic_vs_sgd"])
    assert set(summary["compile_vs_by_hand"]) == {"300", "1000"}
    assert isinstance(summary["memory_k32_vs_k4"], float)
    assert isinstance(summary["loop_overhead"], float)


def test_the_loop_is_measured():
    figures = loop.overhead(epochs=1, rounds=1)
    assert set(figures) == {"loop", "step", "handed_over", "python", "overhead"}
    assert min(figures["loop"], figures["step"], figures["handed_over"]) > figures["python"] > 0
