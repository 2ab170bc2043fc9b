"""Renders the chart with Helm's own SDK, and validates what comes out. Run as a module it writes the snapshots anew."""

from __future__ import annotations

import functools
import gzip
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

helm_python = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

ROOT = Path(__file__).parents[3]
CHART = ROOT / "helm" / "xloom"
# The schema of KubeRay 1.7.0's RayService, version v1, without its descriptions (Apache-2.0, the KubeRay authors).
RAY_SERVICE = Path(__file__).parent / "schemas" / "rayservices.ray.io-1.7.0.json.gz"
SNAPSHOTS = Path(__file__).parent / "snapshots"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
KUBERNETES = "1.37"
# Their CRDs are not at hand.
FOREIGN = {
    "monitoring.coreos.com/v1",
    "gateway.networking.k8s.io/v1",
    "networking.gke.io/v1",
    "cloud.google.com/v1",
}

Values = dict[str, Any]
Object = dict[str, Any]


@functools.cache
def chart(folder: Path = CHART) -> Any:
    """The chart, loaded once."""
    return helm_python.Chart.load(folder)


def render_files(values: Values, name: str = "xloom", folder: Path = CHART) -> dict[str, str]:
    """What `helm template` gives, by template."""
    files: dict[str, str] = chart(folder).render(values, name=name, namespace="serving")
    return files


def render(values: Values, name: str = "xloom", folder: Path = CHART) -> list[Object]:
    """The objects a release would have."""
    found = []
    for file, text in render_files(values, name, folder).items():
        if not file.endswith("NOTES.txt"):
            found += [each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each]
    return found


def refusal(values: Values) -> str:
    """Why Helm does not render these values, in its words. Fails when it does."""
    with pytest.raises(helm_python.HelmError) as caught:
        chart().render(values, name="xloom", namespace="serving")
    return re.sub(r"\s+", " ", str(caught.value))


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    """Those of one kind."""
    return [each for each in objects if each["kind"] == kind]


def one(objects: list[Object], kind: str) -> Object:
    """The only one of a kind."""
    [found] = of_kind(objects, kind)
    return found


def example(file: Path) -> Values:
    """The values of an example."""
    values: Values = yaml.safe_load(file.read_text(encoding="utf-8"))
    return values


def merged(base: Values, extra: Values) -> Values:
    """Values over values, as Helm lays them."""
    result = dict(base)
    for key, value in extra.items():
        mapping = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if mapping else value
    return result


def pod_templates(objects: list[Object]) -> dict[str, Object]:
    """Every pod there will be, as a Pod: the head, each worker group, the test hook; the autoscaler in the head."""
    cluster = one(objects, "RayService")["spec"]["rayClusterConfig"]
    pods = {"head": _as_pod(cluster["headGroupSpec"]["template"])}
    if cluster["enableInTreeAutoscaling"]:
        # KubeRay puts this container beside the head's, with these options over its own.
        options = cluster["autoscalerOptions"]
        container = {"name": "autoscaler", "image": "the head's", "securityContext": options["securityContext"]}
        pods["head"]["spec"]["containers"].append(container | {"volumeMounts": options["volumeMounts"]})
    for group in cluster["workerGroupSpecs"]:
        pods[f"worker {group['groupName']}"] = _as_pod(group["template"])
    for pod in of_kind(objects, "Pod"):
        pods[pod["metadata"]["name"]] = pod
    return pods


def _as_pod(template: Object) -> Object:
    spec = template["spec"] | {"containers": list(template["spec"]["containers"])}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}, "spec": spec}


def validate(objects: list[Object]) -> None:
    """Each object against its schema, unknown fields refused."""
    utils = kubernetes_validate.utils
    if not hasattr(utils.schema_contents, "cache_info"):  # it reads a megabyte of definitions for each object
        utils.schema_contents = functools.cache(utils.schema_contents)
    for each in [*objects, *pod_templates(objects).values()]:
        assert each["metadata"]["name"]
        if each["apiVersion"] == "ray.io/v1":
            crd_validator().validate(each)
        elif each["apiVersion"] not in FOREIGN:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


@functools.cache
def crd_validator() -> jsonschema.Draft202012Validator:
    """KubeRay's schema, strict: what it does not name is refused, as the API server would drop it."""
    schema = json.loads(gzip.decompress(RAY_SERVICE.read_bytes()))
    schema["properties"]["metadata"] = {"x-kubernetes-preserve-unknown-fields": True}
    return jsonschema.Draft202012Validator(strict(schema))


def strict(schema: Any) -> Any:
    """An OpenAPI v3 schema as JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {
        name: {key: strict(value) for key, value in inner.items()} if name == "properties" else strict(inner)
        for name, inner in schema.items()
    }
    if "properties" in found and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def snapshots() -> dict[str, str]:
    """By file: the default release and each example, one document an object.

    Alerts and dashboards are left out: they are made elsewhere, and looked at there.
    """
    releases = {"default": {}} | {file.stem: example(file) for file in EXAMPLES}
    return {f"{name}.yaml": yaml.safe_dump_all(_recorded(render(values))) for name, values in releases.items()}


def _recorded(objects: list[Object]) -> list[Object]:
    made = {"PrometheusRule", "ConfigMap"}
    return [each for each in objects if each["kind"] not in made]


if __name__ == "__main__":
    for name, text in snapshots().items():
        (SNAPSHOTS / name).write_text(text, encoding="utf-8")
