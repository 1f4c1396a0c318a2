"""Makes the schemas beside it, for tests/test_deploy.py, from two packages that the tests themselves do not need.

    pip install kubernetes-validate check-jsonschema && python tests/schemas/make.py

`kubernetes-validate` (Apache-2.0) carries the JSON schemas of every Kubernetes release, 17,000 files; here are the
strict ones of one release and the kinds in deploy/kubernetes, without descriptions. `check-jsonschema` (Apache-2.0)
carries the Compose specification's own schema (Apache-2.0), which is copied as it is.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RELEASE = "v1.37.0"
KINDS = (
    "configmap-v1", "deployment-apps-v1", "service-v1", "horizontalpodautoscaler-autoscaling-v2",
    "poddisruptionbudget-policy-v1",
)  # fmt: skip


def without_descriptions(schema: Any) -> Any:
    """`schema` less what only people read."""
    if isinstance(schema, dict):
        kept = {k: v for k, v in schema.items() if not (k == "description" and isinstance(v, str))}
        return {k: without_descriptions(v) for k, v in kept.items() if not k.startswith(("x-kubernetes", "$id"))}
    return [without_descriptions(item) for item in schema] if isinstance(schema, list) else schema


def references(schema: Any) -> set[str]:
    """Names of the definitions that `schema` refers to."""
    if isinstance(schema, dict):
        own = {schema["$ref"].rpartition("/")[2]} if isinstance(schema.get("$ref"), str) else set()
        return own.union(*map(references, schema.values()))
    return set().union(*map(references, schema)) if isinstance(schema, list) else set()


def kubernetes() -> dict[str, Any]:
    """`{"kinds": {"apps/v1 Deployment": schema}, "$defs": {...}}`, all references to `#/$defs/`."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"{RELEASE}-local-strict"
    read = lambda name: without_descriptions(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))  # noqa: E731
    everything = read("_definitions")["$defs"]
    kinds, wanted, found = {}, set(), set()
    for name in KINDS:
        schema = read(name)
        (kind,), (version,) = schema["properties"]["kind"]["enum"], schema["properties"]["apiVersion"]["enum"]
        kinds[f"{version} {kind}"] = schema
        wanted |= references(schema)
    while wanted - found:
        found |= wanted
        wanted = wanted.union(*(references(everything[name]) for name in wanted))
    result = {"kinds": kinds, "$defs": {name: everything[name] for name in sorted(found)}}
    return dict(json.loads(re.sub(r'"[^"#]*#/\$defs/', '"#/$defs/', json.dumps(result))))


def main() -> None:
    (HERE / f"kubernetes-{RELEASE}.json").write_text(json.dumps(kubernetes(), separators=(",", ":")) + "\n", "utf-8")
    vendor = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    (HERE / "compose-spec.json").write_text(vendor.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main()
