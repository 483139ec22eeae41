"""KubeRay's API reference -> kuberay_fields.json: the fields of a RayService, a RayJob and of all that they hold.

    python tests/data/kuberay_fields.py API_MD COMMIT > tests/data/kuberay_fields.json

API_MD is docs/reference/api.md of ray-project/kuberay at a release, which is generated from the Go types as the CRDs
are; COMMIT names the release. Pods are Kubernetes' own: their fields come from the package `kubernetes`, whose
major version is that of the API. An old one is right: what it knows, every cluster of today knows.
"""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

from kubernetes.client import models

ROW = re.compile(r"^\| `(\w+)` _(?:\[(\w+)\]\([^)]*\)|(\w+))(?: \([^)]*\))?( array)?_ \|")
Fields = dict[
    str, dict[str, str]
]  # type -> field -> its type, "" for a plain value, with [] behind that of a list


def rays_own(reference: str) -> Fields:
    types: Fields = {}
    for section in re.split(r"^#+ (?=\w+$)", reference, flags=re.MULTILINE)[1:]:
        name, *lines = section.splitlines()
        rows = [found for line in lines if (found := ROW.match(line))]
        fields = {row[1]: f"{row[2] or ''}{'[]' if row[4] else ''}" for row in rows}
        if fields:
            types.setdefault(name, fields)
    return types


def kubernetes_own(name: str) -> dict[str, str] | None:
    model = getattr(models, f"V1{name}", None)
    if model is None:
        return None
    fields = {}
    for attribute, field in model.attribute_map.items():
        kind = model.openapi_types[attribute]
        inner = re.search(r"V1(\w+)", kind)
        fields[field] = f"{inner[1] if inner else ''}{'[]' if kind.lower().startswith('list') else ''}"
    return fields


def main(reference: str, commit: str) -> None:
    known, types = rays_own(Path(reference).read_text(encoding="utf-8")), {}
    wanted = ["RayService", "RayJob"]
    while wanted:
        name = wanted.pop()
        fields = known.get(name) or kubernetes_own(name)
        if fields is None or name in types:  # an enumeration is a plain value
            continue
        types[name] = fields
        wanted += [kind.removesuffix("[]") for kind in fields.values()]
    source = f"ray-project/kuberay, docs/reference/api.md at {commit}; kubernetes {version('kubernetes')}"
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(types[name])}" for name in sorted(types))
    print(f'{{"source": {json.dumps(source)}, "types": {{\n{lines}\n}}}}')


if __name__ == "__main__":
    main(*sys.argv[1:])
