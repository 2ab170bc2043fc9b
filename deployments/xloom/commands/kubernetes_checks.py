"""What `xloom doctor --kubernetes` asks of a cluster through kubectl: what the chart needs there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xloom.commands.checks import Finding
from xloom.protocol import XloomError
from xloom.settings_file import read_settings_file

LEAST = (1, 29)  # Chart.yaml's kubeVersion
CHART_FIELDS = {"authOptions": "secretName", "gcsFaultToleranceOptions": "backend"}  # KubeRay 1.7's
TIMEOUT_S = 15
MONITORS = "https://github.com/prometheus-operator/prometheus-operator"
KUBERAY = (
    "helm show crds kuberay/kuberay-operator --version 1.7.0 | kubectl apply --server-side --force-conflicts -f - && "
    "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0 --skip-crds -n kuberay --create-namespace"
)

Values = dict[str, Any]


class Forbidden(Exception):
    """This user may not ask for it; the message is the API server's."""


class Kubectl:
    """A cluster as kubectl reaches it."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def get(self, *what: str) -> dict[str, Any] | None:
        """What `kubectl get` gives, in the namespace; None where there is nothing of the name.

        Raises `XloomError` (no_cluster) when no cluster answers, and `Forbidden`.
        """
        return self._json("get", *what, "-n", self.namespace)

    def version(self) -> tuple[int, int]:
        """The API server's. Raises `XloomError` (no_cluster)."""
        found = (self._json("version") or {}).get("serverVersion")
        if not found:
            raise _no_cluster("kubectl reaches no API server")
        return int(found["major"]), int(re.sub(r"\D.*", "", found["minor"]))

    def _json(self, *arguments: str) -> dict[str, Any] | None:
        command = ["kubectl", *arguments, "-o", "json", f"--request-timeout={TIMEOUT_S}s"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=2 * TIMEOUT_S, check=False)
        except FileNotFoundError:
            raise _no_cluster("kubectl is not installed here") from None
        except subprocess.TimeoutExpired:
            raise _no_cluster(f"kubectl {arguments[0]} did not end within {2 * TIMEOUT_S} s") from None
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout)
            return found
        said = done.stderr.strip().splitlines()[-1:] or ["it failed"]
        if "(NotFound)" in said[0] or "doesn't have a resource type" in said[0]:
            return None
        if "(Forbidden)" in said[0]:
            raise Forbidden(said[0].partition("(Forbidden): ")[2])
        raise _no_cluster(f"kubectl {' '.join(arguments[:2])}: {said[0]}")


def _no_cluster(what: str) -> XloomError:
    return XloomError(
        "no_cluster", f"{what.rstrip('.?')}.", "Install kubectl and set KUBECONFIG, or look with another context."
    )


def examine_cluster(namespace: str, values: Path | None) -> list[Finding]:
    """All findings about the cluster for a values file of the chart, or for its defaults. Raises `XloomError`."""
    if shutil.which("kubectl") is None:
        raise _no_cluster("kubectl is not installed here")
    given = read_settings_file(values) if values is not None else {}
    kubectl = Kubectl(namespace)
    found: list[Finding] = []
    checks: dict[str, Callable[[], list[Finding]]] = {
        "kubernetes": lambda: [check_version(kubectl.version())],
        "kuberay": lambda: check_kuberay(kubectl),
        "secrets": lambda: check_secrets(kubectl, given),
        "storage": lambda: [check_storage(kubectl, given)],
        "gpus": lambda: check_gpus(kubectl, given),
        "kinds": lambda: check_kinds(kubectl, given),
    }
    for name, check in checks.items():
        try:
            found += check()
        except Forbidden as error:  # as users of one namespace alone may not look at nodes
            found.append(Finding(name, "warn", str(error), "Ask whoever runs the cluster, or use another context."))
    return found


def check_version(version: tuple[int, int]) -> Finding:
    """Whether the chart takes this Kubernetes."""
    text = ".".join(map(str, version))
    if version >= LEAST:
        return Finding("kubernetes", "ok", text)
    return Finding("kubernetes", "fail", f"{text} is older than 1.29", "Upgrade the cluster.")


def missing_fields(schema: dict[str, Any]) -> list[str]:
    """Fields of a Ray cluster that the chart sets and a RayService's schema does not have: an older CRD drops them."""
    below: dict[str, Any] = schema
    for name in ("spec", "rayClusterConfig"):
        below = below.get("properties", {}).get(name, {})
    found = below.get("properties", {})
    parts = {part: found.get(part, {}).get("properties", {}) for part in CHART_FIELDS}
    return [f"{part}.{CHART_FIELDS[part]}" for part, fields in parts.items() if CHART_FIELDS[part] not in fields]


def check_kuberay(kubectl: Kubectl) -> list[Finding]:
    """KubeRay's CRD, with the version the chart uses, and its operator, wherever it runs."""
    crd = kubectl.get("crd", "rayservices.ray.io")
    versions = (crd or {}).get("spec", {}).get("versions", [])
    served = [each for each in versions if each.get("served") and each["name"] == "v1"]
    if not served:
        return [Finding("kuberay", "fail", "there is no RayService of version v1", KUBERAY)]
    if missing := missing_fields(served[0].get("schema", {}).get("openAPIV3Schema", {})):
        detail = f"the RayService's CRD is older than 1.7 (it has no {missing[0]}), and Helm does not upgrade it"
        return [Finding("kuberay", "fail", detail, KUBERAY.partition(" && ")[0])]
    selector = "app.kubernetes.io/component=kuberay-operator"
    found = (kubectl.get("deployments", "--all-namespaces", "-l", selector) or {}).get("items", [])
    ready = [each for each in found if each.get("status", {}).get("availableReplicas")]
    if not ready:
        return [Finding("kuberay", "fail", "its operator does not run", KUBERAY.partition(" && ")[2])]
    images = [each["spec"]["template"]["spec"]["containers"][0]["image"] for each in ready]
    return [Finding("kuberay", "ok", ", ".join(images))]


def wanted_secrets(values: Values) -> dict[str, list[str]]:
    """The entries that pods read, by the Secret's name. One Secret may hold several parts' entries."""
    auth, hub = values.get("auth", {}), values.get("hub", {})
    redis, ray = values.get("gcsFaultTolerance", {}), values.get("rayAuth", {})
    parts = [(auth.get("existingSecret", "xloom-keys"), [auth.get("apiKey", "api-key")])]
    parts.append((hub.get("existingSecret", ""), [hub.get("tokenKey", "token")]))
    if redis.get("enabled"):
        entries = [redis.get("passwordKey", "password"), redis.get("usernameKey", "")]
        parts.append((redis.get("existingSecret", ""), [each for each in entries if each]))
    if ray.get("mode", "token") == "token":
        parts.append((ray.get("existingSecret", ""), ["auth_token"]))
    found: dict[str, list[str]] = {}
    for name, entries in parts:
        if name:
            found.setdefault(name, []).extend(entries)
    return found


def check_secrets(kubectl: Kubectl, values: Values) -> list[Finding]:
    """The Secrets that pods wait for, with the entries they read."""
    findings = []
    for name, entries in wanted_secrets(values).items():
        found = kubectl.get("secret", name)
        missing = [entry for entry in entries if entry not in (found or {}).get("data", {})]
        literals = " ".join(f"--from-literal={entry}=..." for entry in entries)
        if missing:
            detail = (
                f"{name} is not in the namespace {kubectl.namespace}" if found is None else f"it lacks {missing[0]}"
            )
            cure = f"kubectl -n {kubectl.namespace} create secret generic {name} {literals}"
            findings.append(Finding(f"secret {name}", "fail", detail, cure))
        else:
            findings.append(Finding(f"secret {name}", "ok", f"has {', '.join(entries)}"))
    return findings


def check_storage(kubectl: Kubectl, values: Values) -> Finding:
    """Whether volumes will be given: by the classes that are named, or the cluster's default."""
    persistence = values.get("persistence", {})
    cache, store = persistence.get("cache", {}), persistence.get("store", {})
    wanted = []
    if cache.get("type", "ephemeral") != "none" and not cache.get("existingClaim"):
        wanted.append(cache.get("storageClass", ""))
    if store.get("enabled", True) and not store.get("existingClaim"):
        wanted.append(store.get("storageClass", ""))
    if not wanted:
        return Finding("storage", "ok", "no volume is asked for")
    classes = (kubectl.get("storageclass") or {}).get("items", [])
    names = {each["metadata"]["name"] for each in classes}
    default = "storageclass.kubernetes.io/is-default-class"
    if any(each["metadata"].get("annotations", {}).get(default) == "true" for each in classes):
        names.add("")
    absent = sorted(set(wanted) - names)
    if absent:
        named = (
            f"there is no storage class {absent[-1]!r}" if absent[-1] else "the cluster has no default storage class"
        )
        cure = "Set persistence.cache.storageClass and persistence.store.storageClass to one of: "
        return Finding("storage", "fail", named, cure + (", ".join(sorted(names - {""})) or "none is there"))
    return Finding("storage", "ok", ", ".join(name or "the default class" for name in sorted(set(wanted))))


def check_gpus(kubectl: Kubectl, values: Values) -> list[Finding]:
    """Whether nodes show the GPUs that a pod of each group asks for. A node pool that starts at none shows none."""
    findings = []
    nodes = (kubectl.get("nodes") or {}).get("items", [])
    for group in values.get("workerGroups", []):
        if not (count := group.get("gpus", 0)):
            continue
        resource = group.get("gpuResource", "nvidia.com/gpu")
        fit = [each for each in nodes if int(each["status"].get("allocatable", {}).get(resource, 0)) >= count]
        check = f"group {group.get('name', '')}"
        if fit:
            findings.append(Finding(check, "ok", f"{len(fit)} nodes have {count} {resource}"))
        else:
            detail = f"no node has {count} {resource} now"
            cure = "Install NVIDIA's device plugin or GPU operator; a pool that starts at none is fine."
            findings.append(Finding(check, "warn", detail, cure))
    return findings


def check_kinds(kubectl: Kubectl, values: Values) -> list[Finding]:
    """The kinds of others that the values ask for."""
    metrics = values.get("metrics", {})
    asked = {
        "podmonitors.monitoring.coreos.com": metrics.get("podMonitor", {}).get("enabled"),
        "servicemonitors.monitoring.coreos.com": metrics.get("serviceMonitor", {}).get("enabled"),
        "prometheusrules.monitoring.coreos.com": metrics.get("prometheusRule", {}).get("enabled"),
        "httproutes.gateway.networking.k8s.io": values.get("httpRoute", {}).get("enabled"),
    }
    findings = []
    for kind, wanted in asked.items():
        if not wanted:
            continue
        if kubectl.get("crd", kind) is not None:
            findings.append(Finding(kind.partition(".")[0], "ok", "the cluster has the kind"))
            continue
        cure = f"Install Prometheus' operator ({MONITORS}), or turn metrics off." if "monitoring" in kind else ""
        cure = cure or "Install the Gateway API's CRDs and a controller, or use ingress."
        findings.append(Finding(kind.partition(".")[0], "fail", f"the cluster has no {kind}", cure))
    return findings
