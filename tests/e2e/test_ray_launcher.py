"""`ray up` and `ray submit` with cluster/on-premises.yaml over real ssh, to this machine as the head.

The head has no workers: Ray's autoscaler would reach them by ssh at port 22, which is not ours to listen at.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.pages import ROOT, Block, Reader, blocks
from tests.programs import found, needs
from xloom.processes import end_marked

from .served import API_KEY, TOKENS, free_port
from .weights import Oracle, Weights, settings_for

pytestmark = [
    pytest.mark.slow,
    needs("sshd", package="openssh-server"),
    needs("rsync", package="rsync"),
]

MARK = "XLOOM_LAUNCHER_RUN"
HEAD = "127.0.0.1"
PROMPT = list(range(40, 70))


class Machines:
    """The laptop's home folder, that of the machines, and the ssh server in front of them: nothing outside `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.laptop, self.home = folder / "laptop", folder / "home"
        for each in (self.laptop, self.home, folder / "ray", folder / "state"):
            each.mkdir()
        self.port = free_port()
        for name in ("host", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        # sshd takes the home folder of the account: HOME says another, and a login would begin there.
        (self.home / ".bashrc").write_text('cd "$HOME"\n')
        (self.home / ".xloom-env").write_text(f"export XLOOM_API_KEY={API_KEY} HF_HUB_OFFLINE=1\n")
        proxy = folder / "proxy"  # Ray's launcher knows no port but 22
        proxy.write_text(f"#!/bin/bash\nexec 3<>/dev/tcp/{HEAD}/{self.port}\ncat <&3 &\ncat >&3\nkill $!\n")
        proxy.chmod(0o700)
        lines = (
            f"Port {self.port}", f"ListenAddress {HEAD}", f"HostKey {folder}/host", f"PidFile {folder}/pid",
            f"AuthorizedKeysFile {folder}/key.pub", "StrictModes no", "UsePAM no", "PasswordAuthentication no",
            f"SetEnv HOME={self.home} RAY_TMPDIR={folder}/ray RAY_USAGE_STATS_ENABLED=0 {MARK}={self.mark}",
        )  # fmt: skip
        (folder / "sshd_config").write_text("\n".join(lines) + "\n")

    @contextlib.contextmanager
    def reachable(self) -> Iterator[None]:
        """The ssh server runs; at the end it and all that was started through it are gone."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks itself in; its package's boot script makes it
        with (self.folder / "sshd.log").open("wb") as log:
            sshd = str(found("sshd"))  # by its path, which it asks for
            server = subprocess.Popen([sshd, "-D", "-e", "-f", str(self.folder / "sshd_config")], stderr=log)
        try:
            yield
        finally:
            end_marked(MARK, self.mark, timeout_s=30)
            server.kill()
            server.wait()

    def launcher(self, port: int) -> dict[str, Any]:
        """cluster/on-premises.yaml with what is this machine's: addresses, ports, key, and xloom already installed."""
        config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "on-premises.yaml").read_text(encoding="utf-8"))
        config["cluster_name"] = f"xloom-{self.mark[:8]}"
        config["provider"] |= {"head_ip": HEAD, "worker_ips": []}
        config |= {"min_workers": 0, "max_workers": 0}
        config["auth"] = {
            "ssh_user": getpass.getuser(),
            "ssh_private_key": str(self.folder / "key"),
            "ssh_proxy_command": str(self.folder / "proxy"),
        }
        install, path = config["setup_commands"]
        assert install == "cd ~/xloom && make install"
        config["setup_commands"] = [f"ln -sfn {sys.prefix} ~/xloom/.venv", path]
        stop, start = config["head_start_ray_commands"]
        assert stop.endswith("ray stop")  # would end every Ray on this machine
        own = "--num-cpus=2 --min-worker-port=25000 --max-worker-port=25399"
        for name in ("dashboard-agent-listen", "dashboard", "ray-client-server"):
            own += f" --{name}-port={free_port()}"
        config["head_start_ray_commands"] = [f"{start.replace('6379', str(port))} {own}"]
        return config


@pytest.fixture
def machines() -> Iterator[Machines]:
    folder = Path(tempfile.mkdtemp(prefix="xl-", dir="/tmp"))  # sockets need a short path
    made = Machines(folder)
    try:
        with made.reachable():
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_ray_up_and_ray_submit(machines: Machines, weights: Weights, oracle: Oracle) -> None:
    """The commands of docs/ray-clusters.md, less `ray down`, which would end every Ray on this machine."""
    [block] = [each for each in blocks("ray-clusters.md") if "ray submit" in each.text]
    generate, up, submit, down = [line for line in block.text.splitlines() if not line.startswith("#")]
    assert down.startswith("ray down")
    port = free_port()
    stores = {"path": str(machines.home / "store"), "cache": str(machines.home / "cache")}
    settings = settings_for(weights, replicas={"cpus": 1.5}, router={"port": port, "host": "0.0.0.0"}, store=stores)
    (machines.home / "settings.yaml").write_text(yaml.safe_dump(settings))
    (machines.folder / "checkout").mkdir()
    file = machines.folder / "on-premises.yaml"
    file.write_text(yaml.safe_dump(machines.launcher(free_port())))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XLOOM_"))}
    own = {"HOME": str(machines.laptop), "RAY_TMPDIR": str(machines.folder / "state"), "RAY_USAGE_STATS_ENABLED": "0"}
    # The settings are named as the page names them: from the head's home folder.
    names = {"cluster/on-premises.yaml": str(file), "xloom/cluster/local.yaml": "settings.yaml"}
    reader = Reader(machines.folder / "checkout", inherited | own, names)

    reader.run(Block("this test", 0, f"{generate}\n{up}"))
    assert (machines.home / ".ray" / "auth_token").read_text() == (machines.laptop / ".ray" / "auth_token").read_text()
    said = reader.run(Block("this test", 0, submit))
    served = re.search(r"Serving base, alpha, beta, blend at port (\d+)", said)
    assert served is not None, said
    assert int(served[1]) == port
    assert httpx.get(f"http://127.0.0.1:{port}/xloom/status", timeout=30, trust_env=False).status_code == 401
    headers = {"Authorization": f"Bearer {API_KEY}"}
    status = httpx.get(f"http://127.0.0.1:{port}/xloom/status", headers=headers, timeout=30, trust_env=False).json()
    assert len(status["replicas"]) == 1
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=API_KEY, max_retries=0) as client:
        answer = client.completions.create(
            model="blend", prompt=PROMPT, max_tokens=12, temperature=0, extra_body=TOKENS
        )
        assert answer.choices[0].model_extra["token_ids"] == oracle("blend", tuple(PROMPT), 12)
