"""Check a PyTorchJob against the classes that Kubeflow generates from its schema.

Called by ``tools/check_clusters.sh``, whose environment has ``kubeflow-training``. Reading a field
into its class fails for a wrong kind or a missing value, and loses a name that the schema lacks.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from kubeflow.training.api_client import ApiClient

KIND = "KubeflowOrgV1PyTorchJob"


def lost(given: Any, found: Any, place: str = "") -> list[str]:
    """Return where a manifest and what was read of it differ."""
    if isinstance(given, dict) and isinstance(found, dict):
        keys = sorted(given.keys() | found.keys())
        return [
            name for key in keys for name in lost(given.get(key), found.get(key), f"{place}/{key}")
        ]
    if isinstance(given, list) and isinstance(found, list) and len(given) == len(found):
        pairs = enumerate(zip(given, found, strict=True))
        return [name for index, pair in pairs for name in lost(*pair, f"{place}/{index}")]
    return [] if given == found else [f"{place}: {given!r} was read as {found!r}"]


def main() -> int:
    """Return how many places of the manifest do not fit the schema."""
    manifest = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    client = ApiClient()
    job = client.deserialize(SimpleNamespace(data=json.dumps(manifest)), KIND)
    wrong = lost(manifest, client.sanitize_for_serialization(job))
    print("\n".join(wrong) or f"{sys.argv[1]} fits {KIND}")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
