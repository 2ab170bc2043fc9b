"""Writes helm/xloom/README.md from the comments of values.yaml; `--check` says whether it is up to date."""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml
from commented import CHART, Key, read_values

README = CHART / "README.md"

INTRO = """\
# The xloom chart

{description}, run by [KubeRay](https://github.com/ray-project/kuberay) as a RayService. Version {version}.

```sh
kubectl create secret generic xloom-keys --from-literal=api-key=... --from-literal=admin-key=...
helm install xloom helm/xloom -f helm/xloom/examples/values-cpu.yaml --set image.repository=registry.example.com/xloom
helm test xloom
```

[docs/kubernetes.md](../../docs/kubernetes.md) goes through it step by step. It needs KubeRay 1.7 and its CRDs, which
are not part of the chart. Values that can't work are refused as the chart renders, with what to do.

| example | |
|---|---|
{examples}

## What it makes

A RayService, and with it through KubeRay the Ray cluster and the service `RELEASE-serve-svc` of the endpoint; service
accounts without a token; a volume claim for the adapter store, which stays on uninstall; a network policy.
If asked: a volume claim for caches, Ingress or HTTPRoute and what tells a cloud's load balancer of them,
PodDisruptionBudget, PodMonitor, ServiceMonitor, PrometheusRule, dashboards.
All pods meet the restricted Pod Security Standard, with GPUs too.

## Values

Made from the comments in [values.yaml](values.yaml) by `python helm/readme.py`.

| key | default | meaning |
|---|---|---|
"""


def shown(value: Any) -> str:
    """A default as the table shows it."""
    if value == "":
        return '`""`'
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def row(key: Key) -> str:
    """A key's line of the table."""
    path = ".".join(key.path).replace(".[]", "[]")
    default = "" if key.children else shown(key.default)
    return f"| `{path}` | {default} | {key.description.replace('|', chr(92) + '|')} |"


def readme() -> str:
    """The whole file."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    examples = []
    for file in sorted((CHART / "examples").glob("*.yaml")):
        first = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        examples.append(f"| [{file.name}](examples/{file.name}) | {first} |")
    rows = [row(key) for top in read_values() for key in top.walk() if key.description]
    intro = INTRO.format(description=chart["description"], version=chart["version"], examples="\n".join(examples))
    return intro + "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    """The command."""
    text = readme()
    if "--check" in arguments:
        if README.is_file() and README.read_text(encoding="utf-8") == text:
            return 0
        print(f"{README.name} is not what values.yaml says. Run: python helm/readme.py", file=sys.stderr)
        return 1
    README.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
