"""The machines that the Mistral example names fit its pods, by what the clouds reserve of them for the system."""

from __future__ import annotations

import re

from tests.unit.chart.rendering import CHART, example

FILE = CHART / "examples" / "values-mistral-7b-xlora.yaml"
BESIDE_CPUS, BESIDE_GIB = 0.5, 1.0  # what runs on each node beside


def reserved_cpus(cpus: int) -> float:
    """Of a node, in GKE and EKS alike: 6 % of the first, 1 % of the second, 0.5 % of two more, 0.25 % of the rest."""
    shares = [0.06, 0.01, 0.005, 0.005] + [0.0025] * cpus
    return sum(shares[:cpus])


def gke_memory(gib: float) -> float:
    """What is left for pods: reserved are 25 % of the first 4 GiB, 20 % of 4, 10 % of 8, 6 % of 112, and 0.1."""
    reserved, left = 0.1, gib
    for size, share in ((4, 0.25), (4, 0.2), (8, 0.1), (112, 0.06)):
        part = min(left, size)
        reserved, left = reserved + share * part, left - part
    return gib - reserved


def eks_memory(gib: float, pods: int) -> float:
    """What is left for pods: 255 MiB and 11 MiB for each pod the machine takes are reserved, and 100 MiB more."""
    return gib - (255 + 11 * pods + 100) / 1024


def test_the_machines_named_fit_the_gpu_group_and_the_next_smaller_do_not() -> None:
    text = FILE.read_text(encoding="utf-8")
    group = example(FILE)["workerGroups"][0]
    cpus, memory = group["cpus"], float(group["memory"].removesuffix("Gi"))
    left = 8 - reserved_cpus(8)
    gke, eks = gke_memory(32), eks_memory(32, 58)
    named = " ".join(re.findall(r"^# (.*)$", text, re.MULTILINE))
    assert f"{cpus} CPUs and {memory:g} GiB" in named
    assert f"leaves pods {left:.2f} CPUs and {gke:.1f} GiB" in named
    assert f"{left:.2f} and {eks:.1f}" in named
    for available in (gke, eks):
        assert left - BESIDE_CPUS >= cpus
        assert available - BESIDE_GIB >= memory
    assert 4 - reserved_cpus(4) < cpus  # g2-standard-4, g6.xlarge
