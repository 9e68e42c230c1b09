"""Manifests and the Dockerfile of ``examples/``: consistent in themselves and with ``train.sh``.

``tools/check_clusters.sh`` checks them against public schemas, in an environment of its own. No
cluster and no image is made here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_recipes import EXAMPLES, RECIPES, ROOT, Launch, launch

KUBERNETES = EXAMPLES / "kubernetes"
DOCKER = EXAMPLES / "docker"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8")))


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["spec"]["containers"]
    return container


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"]}


def check_pod(pod: dict[str, Any], nodes: int) -> None:
    container = container_of(pod)
    environment = environment_of(container)
    assert environment["NUM_NODES"] == str(nodes)
    assert environment["GPUS_PER_NODE"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert container["args"][0] in RECIPES
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert mounts["shared-memory"] == "/dev/shm"
    for name in ("TOKENIZER_MODEL", "DATA_PATH", "CHECKPOINTS"):
        assert environment[name].startswith(mounts["data"] + "/")


def start(folder: Path, pod: dict[str, Any], **from_cluster: str) -> Launch:
    """Run the command of a pod with what its cluster tells it."""
    container = container_of(pod)
    (program, *arguments) = [*container["command"], *container["args"]]
    assert program == "bash"
    environment = {"MEGATRON_LM": "/lm", **environment_of(container), **from_cluster}
    started = launch(folder, *arguments, **environment)
    assert started.result.returncode == 0, started.result.stderr
    return started


def test_pytorchjob(tmp_path: Path) -> None:
    (job,) = documents("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    nodes = sum(replica["replicas"] for replica in replicas.values())
    for rank, (kind, replica) in enumerate(replicas.items()):
        pod = replica["template"]
        check_pod(pod, nodes)
        container = container_of(pod)
        assert container["name"] == "pytorch"
        assert job["spec"]["nprocPerNode"] == environment_of(container)["GPUS_PER_NODE"]
        (port,) = container["ports"]
        assert port["name"] == "pytorchjob-port"
        # What the operator adds; see kubeflow/training-operator, pkg/controller.v1/pytorch.
        master = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": str(port["containerPort"])}
        started = start(tmp_path, pod, **master, RANK=str(rank), WORLD_SIZE="16", PET_NNODES="2")
        assert started.option("--node-rank") == str(rank), kind
        assert started.option("--nnodes") == str(nodes)
        assert started.option("--master-addr") == "job-master-0"
        assert started.option("--master-port") == str(port["containerPort"])


def test_indexed_job(tmp_path: Path) -> None:
    service, job = documents("job.yaml")
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec, name = job["spec"], job["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    pod = spec["template"]
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    check_pod(pod, spec["completions"])
    for index in range(spec["completions"]):
        started = start(tmp_path, pod, JOB_COMPLETION_INDEX=str(index))
        assert started.option("--node-rank") == str(index)
        # The name of pod 0: that of the job and its index, in the service.
        assert started.option("--master-addr") == f"{name}-0.{pod['spec']['subdomain']}"


def test_manifests_share_inputs_and_image() -> None:
    (pytorchjob,), (_, job) = documents("pytorchjob.yaml"), documents("job.yaml")
    ours = container_of(job["spec"]["template"])
    theirs = container_of(pytorchjob["spec"]["pytorchReplicaSpecs"]["Master"]["template"])
    for key in ("image", "args", "resources", "volumeMounts", "securityContext"):
        assert ours[key] == theirs[key]
    own = {"MASTER_ADDR", "MASTER_PORT"}
    kept = {k: v for k, v in environment_of(ours).items() if k not in own}
    assert kept == environment_of(theirs)


def test_dockerfile_brings_what_the_scripts_need() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    release = re.search(r"--branch (core_v[\d.]+) ", text)
    assert release
    assert f"Megatron-LM {release[1]}" in (EXAMPLES / "train.sh").read_text()
    pins = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "requirements/runtime.txt").read_text(), re.M)
    )
    assert (
        release[1].removeprefix("core_v").rsplit(".", 1)[0]
        == pins["megatron-core"].rsplit(".", 1)[0]
    )
    assert f"einops=={pins['einops']}" in text
    folder = re.search(r"git clone .* (/\S+) ", text)
    assert folder
    assert f"ENV MEGATRON_LM={folder[1]}\n" in text


@pytest.mark.parametrize("path", ["setup.py", "pyproject.toml", "examples", "README.md", "LICENSE"])
def test_docker_sees_what_it_builds(path: str) -> None:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[lines.index("*") :]
    assert f"!{path}" in lines
    assert (ROOT / path).exists()
