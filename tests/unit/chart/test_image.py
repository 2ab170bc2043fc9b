"""The Dockerfile fits the tree and the chart, as far as reading it tells: no image is built here."""

from __future__ import annotations

import re
import tomllib

import yaml

from tests.unit.chart.rendering import CHART, EXAMPLES, ROOT, example, pod_templates, render
from xloom.settings import SAMPLE, parse_settings

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STAGES = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
LINES = re.sub(r"\\\n", " ", re.sub(r"^ *#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()  # one an instruction


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


def instructions(name: str) -> list[str]:
    """The arguments of each instruction of a kind."""
    return [line.partition(" ")[2].strip() for line in LINES if line.startswith(f"{name} ")]


def test_every_package_of_the_project_is_in_the_image() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = project["tool"]["setuptools"]["packages"]["find"]["where"]
    final = [stage for stage in STAGES if stage.startswith("final AS ")]
    for folder in folders:
        assert all(f"COPY {folder} /opt/xloom/src/{folder}\n" in stage for stage in final)
        outline = next(stage for stage in STAGES if " AS outline" in stage)
        assert re.search(rf"^COPY {folder}/\w+/__init__\.py ", outline, re.MULTILINE)


def test_a_change_of_code_leaves_the_installed_layers_as_they_are() -> None:
    before_code = [stage for stage in STAGES if not stage.startswith("final AS ")]
    for stage in before_code:
        for source in re.findall(r"^COPY (?!--from)(\S+)", stage, re.MULTILINE):
            assert not (ROOT / source).is_dir() or source == "requirements"
    for stage in STAGES:
        if stage.startswith("final AS "):
            copies = re.findall(r"^COPY (\S+)", stage, re.MULTILINE)
            assert copies[0].startswith("--from=install-")  # the large layer comes before the one that changes


def test_the_base_is_pinned_and_nothing_comes_from_elsewhere() -> None:
    stages = [stage.split()[0] for stage in STAGES]
    [base] = {name for name in stages if name not in {stage.split()[2] for stage in STAGES}}
    assert re.fullmatch(r"python:3\.1[1-3]-slim-\w+", base)
    assert not instructions("ADD")
    assert not [words for words in instructions("COPY") if words.split()[0] in (".", "./")]
    assert not re.search(r"\b(curl|wget|git clone)\b[^\n]*https?://(?!127)", DOCKERFILE)


def test_debians_packages_leave_no_lists_and_pip_no_cache_behind() -> None:
    runs = instructions("RUN")
    for run in runs:
        if "apt-get install" in run:
            assert "--no-install-recommends" in run
            assert "rm -rf /var/lib/apt/lists/*" in run
            assert run.index("apt-get update") < run.index("apt-get install")
        if "pip install" in run or "install.py" in run:
            assert run.startswith("--mount=type=cache,target=/root/.cache/pip ")
    assert sum("apt-get install" in run for run in runs) == 1
    assert not any("sudo" in run or "chmod 777" in run for run in runs)


def test_no_secret_is_built_in() -> None:
    assert not instructions("ARG")
    names = [name for line in instructions("ENV") for name in re.findall(r"(\w+)=", line)]
    assert names
    assert not [name for name in names if re.search(r"KEY|TOKEN|SECRET|PASSWORD", name)]


def test_signals_and_probes_reach_the_server() -> None:
    [entry], [command], [health] = instructions("ENTRYPOINT"), instructions("CMD"), instructions("HEALTHCHECK")
    assert entry.startswith('["tini"')  # reaps what an engine leaves, passes SIGTERM on
    assert command.startswith('["xloom", "serve"')
    assert "http://127.0.0.1:8000/ready" in health
    [installed] = [run for run in instructions("RUN") if "apt-get install" in run]
    assert {"bash", "tini", "wget"} <= set(installed.split())


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
