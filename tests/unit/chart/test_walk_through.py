"""The Helm commands of docs/kubernetes.md render, one after the other; the names it uses are the chart's."""

from __future__ import annotations

import itertools
import re

from tests.pages import blocks
from tests.unit.chart.rendering import ROOT, Values, example, helm_python, merged, of_kind, one, render, validate

DOCUMENT = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")


def commands(prefix: str) -> list[list[str]]:
    """The document's commands that begin so, as words."""
    begin = prefix.split()
    return [words for block in blocks("kubernetes.md") for words in block.commands if words[: len(begin)] == begin]


def given(words: list[str], before: Values) -> Values:
    """The values a command names, over those of the release where it says so."""
    values = before if "--reuse-values" in words else {}
    for option, argument in itertools.pairwise(words):
        if option == "-f":
            values = merged(values, example(ROOT / argument))
        elif option in ("--set", "--set-string"):  # which reads numbers as such, and which does not
            read = helm_python.parse_set_string if option == "--set" else helm_python.parse_set_string_values
            values = merged(values, read(argument.replace("$(date -u +%s)", "1764172800")))
    return values


def test_each_command_of_the_walk_through_renders() -> None:
    steps = [words for words in commands("helm") if "helm/xloom" in words]
    assert [words[1] for words in steps] == ["install", *["upgrade"] * 6]
    values: Values = {}
    for words in steps:
        values = given(words, values)
        validate(render(values))


def test_a_block_that_says_it_is_rendered_installs_the_chart() -> None:
    for block in blocks("kubernetes.md"):
        installs = any(words[0] == "helm" and "helm/xloom" in words for words in block.commands)
        assert ("rendered" in (block.reason or "")) is installs


def test_each_example_is_named() -> None:
    named = set(re.findall(r"helm/xloom/examples/([\w.-]+)", DOCUMENT))
    assert named <= {file.name for file in (ROOT / "helm" / "xloom" / "examples").iterdir()}
    assert "values-cpu.yaml" in named


def test_names_in_the_walk_through_are_the_charts() -> None:
    objects = render({})
    claims = {each["metadata"]["name"] for each in of_kind(objects, "PersistentVolumeClaim")}
    [words] = commands("kubectl -n serving delete pvc")
    assert set(words[5:]) == claims
    env = one(objects, "Pod")["spec"]["containers"][0]["env"]
    [url] = [each["value"] for each in env if each["name"] == "URL"]
    assert f"service/{url.removeprefix('http://').partition(':')[0]} 8000" in DOCUMENT
    for secret in commands("kubectl -n serving create secret generic xloom-keys"):
        entries = {word.partition("=")[2].partition("=")[0] for word in secret if word.startswith("--from")}
        assert entries == {"api-key", "admin-key"}


def test_no_path_of_a_folder_is_named_that_is_not_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", DOCUMENT):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists()


def test_the_page_begins_with_one_command_for_a_bare_cluster_then_ones_own_model_then_gpus() -> None:
    bare, own, gpus = [given(words, {}) for words in commands("helm") if "helm/xloom" in words][:3]
    objects = render(bare)
    assert {each["apiVersion"] for each in objects} <= {"v1", "ray.io/v1", "networking.k8s.io/v1"}
    text = str(objects)
    assert "secretKeyRef" not in text
    assert "PersistentVolumeClaim" not in text
    assert "ephemeral'" not in text
    assert (own["settings"], gpus["settings"]["replicas"]["gpus"]) == ({"model": {"source": "org/model"}}, 1)
    [doctor] = commands("xloom doctor")
    assert "--kubernetes" in doctor
    headings = re.findall(r"^## \d\. (.+)$", DOCUMENT, re.MULTILINE)
    assert headings[:3] == ["The sample, on a bare cluster", "Your own model, with keys", "GPUs"]


def test_a_key_is_changed_without_a_gap() -> None:
    [words] = [words for words in commands("helm upgrade") if any(word.startswith("restartedAt") for word in words)]
    values = given(words, {})
    assert one(render(values), "RayService") != one(render({}), "RayService")
