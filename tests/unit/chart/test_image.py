"""The Dockerfile fits the tree and the chart, as far as reading it tells: no image is built here."""

from __future__ import annotations

import re

import yaml

from tests.unit.chart.rendering import CHART, EXAMPLES, ROOT, example, pod_templates, render
from xloom.settings import SAMPLE, parse_settings

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STAGES = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    for words in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for source in words.split()[:-1]:
            assert (ROOT / source).exists()
            assert source.split("/")[0] in allowed


def test_there_is_an_image_for_cpu_and_one_for_cuda_and_neither_runs_as_root() -> None:
    final = {stage.split("\n")[0].split(" AS ")[1]: stage for stage in STAGES}
    for name in ("cpu", "cuda"):
        assert final[name].splitlines()[0] == f"final AS {name}"
        assert final[name].rstrip().endswith("USER 1000:1000")
    assert "HEALTHCHECK" in final["final"]


def test_the_user_is_the_one_of_the_chart() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["podSecurityContext"]
    assert f"--uid {values['runAsUser']} --gid {values['runAsGroup']}" in DOCKERFILE


def test_image_and_chart_agree_on_folders() -> None:
    container = pod_templates(render({}))["worker cpu"]["spec"]["containers"][0]
    env = {each["name"]: each.get("value") for each in container["env"]}
    for name in ("HOME", "HF_HOME", "VLLM_CACHE_ROOT", "RAY_worker_niceness", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        assert re.search(rf"\b{name}={re.escape(env[name])}(\s|$)", DOCKERFILE)


def test_sources_in_the_image_are_those_of_the_sample() -> None:
    assert "ln -s /opt/xloom/src/deployments/xloom/sample /opt/xloom/sample" in DOCKERFILE
    texts = [DOCKERFILE, *(file.read_text(encoding="utf-8") for file in EXAMPLES)]
    named = {found for text in texts for found in re.findall(r"/opt/xloom/sample/([\w/]+)", text)}
    assert {"base", "blend", "adapters/code"} <= named
    for path in named:
        assert (SAMPLE / path).is_dir()


def test_the_images_own_settings_are_valid() -> None:
    [lines] = re.findall(r"printf '%s\\n' \\\n(.*?) > /opt/xloom/settings.yaml", DOCKERFILE, re.DOTALL)
    text = "\n".join(re.findall(r"'(.*)'", lines))
    settings = parse_settings(yaml.safe_load(text), with_keys=False)
    assert settings.router.host == "0.0.0.0"
    chart = pod_templates(render(example(EXAMPLES[0])))["head"]["spec"]["containers"][0]["volumeMounts"]
    folders = [each["mountPath"] for each in chart]
    for path in (settings.store.path, settings.store.cache):
        assert any(path.startswith(f"{folder}/") for folder in folders)
