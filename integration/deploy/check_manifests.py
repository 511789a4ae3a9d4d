"""Checks Kubernetes manifests: each object against its schema, and the objects of a file against each other.

Objects of Kubernetes are held against the published schemas of the newest version in the package `kubernetes-validate`, strictly: a key that does not exist is an error. For
LeaderWorkerSet and DisaggregatedSet there is no such package; what this project uses of them is written down in `SETS` (fields, kinds and ranges of lws 1.0), and the
templates of pods in them are held against the schema of a pod. Without the package (left out with a word) only the second half is done: names that are referred to exist,
labels match selectors, probes and services name ports that are there, an index comes from the label that the engine sets, the embedded volley.toml agrees with the numbers of workers."""

import sys
import tomllib

import yaml

try:
    import jsonschema
    import kubernetes_validate
except ImportError:
    jsonschema = kubernetes_validate = None

POD = {"type": "object"}


def fields(required=(), **properties):
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


GROUPS = fields(
    ["leaderWorkerTemplate"],
    replicas={"type": "integer", "minimum": 1},
    startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
    rolloutStrategy=fields(
        ["type"],
        type={"enum": ["RollingUpdate"]},
        rollingUpdateConfiguration=fields(
            maxUnavailable={"type": ["integer", "string"]}, maxSurge={"type": ["integer", "string"]}, partition={"type": "integer"}
        ),
    ),
    networkConfig=fields(["subdomainPolicy"], subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}),
    leaderWorkerTemplate=fields(
        ["workerTemplate"],
        size={"type": "integer", "minimum": 1},
        restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
        leaderTemplate=POD,
        workerTemplate=POD,
    ),
)
ROLE = fields(["name", "spec"], name={"type": "string", "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}, metadata=POD, spec=GROUPS)
SETS = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): GROUPS,
    ("disaggregatedset.x-k8s.io/v1", "DisaggregatedSet"): fields(["roles"], roles={"type": "array", "minItems": 1, "maxItems": 10, "items": ROLE}),
}
GROUP_INDEX = "metadata.labels['leaderworkerset.sigs.k8s.io/group-index']"
POD_INDEX = "metadata.labels['apps.kubernetes.io/pod-index']"


def workloads(document):
    """Name, number of pods, their template, and the label with a pod's index, of each set of pods in a document."""
    name, spec, kind = document["metadata"]["name"], document["spec"], document["kind"]
    if kind == "StatefulSet":
        return [(name, spec["replicas"], spec["template"], POD_INDEX)]
    roles = [(name, spec)] if kind == "LeaderWorkerSet" else [(f"{name}-{role['name']}", role["spec"]) for role in spec["roles"]]
    return [(n, s["replicas"] * s["leaderWorkerTemplate"]["size"], s["leaderWorkerTemplate"]["workerTemplate"], GROUP_INDEX) for n, s in roles]


def validate(document):
    schema = SETS.get((document["apiVersion"], document["kind"]))
    if schema is None:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        return
    jsonschema.validate(document["spec"], schema)
    for name, _, template, _ in workloads(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **template["metadata"]}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def check(path):
    documents = [document for document in yaml.safe_load_all(open(path)) if document]
    if kubernetes_validate:
        for document in documents:
            try:
                validate(document)
            except Exception as error:
                sys.exit(f"{path}: {document['kind']} {document['metadata']['name']}: {error}")
    by = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    assert len(by) == len(documents), f"{path}: a name twice"
    kinds = ("StatefulSet", "LeaderWorkerSet", "DisaggregatedSet")
    sets = [workload for d in documents if d["kind"] in kinds for workload in workloads(d)]
    labels = [template["metadata"]["labels"] for _, _, template, _ in sets]
    (config,) = [d["data"]["volley.toml"] for d in documents if d["kind"] == "ConfigMap"]
    config = tomllib.loads(config)
    roles = set()
    for name, replicas, template, index in sets:
        pod = template["spec"]
        (container,) = pod["containers"]
        ports = {port["name"] for port in container["ports"]}
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"]:
            if probe in container:
                assert container[probe]["httpGet"]["port"] in ports, f"{name}: {probe}"
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}, f"{name}: volumes"
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in by, name
        if container["args"][0] == "worker":
            role = container["args"][1]
            roles.add(role)
            assert replicas == config["cluster"][f"{role}_workers"], f"{name}: replicas"
            paths = [e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"] if e["name"] == "VOLLEY_WORKER_INDEX"]
            assert paths == [index], f"{name}: its index comes from {paths}, but the engine sets {index}"
    assert roles == {"attention", "expert"}, f"{path}: {roles}"
    for d in documents:
        if d["kind"] == "StatefulSet":
            assert ("Service", d["spec"]["serviceName"]) in by, f"{d['metadata']['name']}: no service {d['spec']['serviceName']}"
            assert d["spec"]["selector"]["matchLabels"].items() <= d["spec"]["template"]["metadata"]["labels"].items(), d["metadata"]["name"]
        elif d["kind"] == "LeaderWorkerSet":
            assert d["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "None", d["metadata"]["name"]
        elif d["kind"] == "DisaggregatedSet":
            assert all(r["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "None" for r in d["spec"]["roles"]), d["metadata"]["name"]
        elif d["kind"] in ("Service", "PodDisruptionBudget"):
            selector = d["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            assert any(selector.items() <= label.items() for label in labels), f"{d['metadata']['name']} selects nothing"
    host, port = config["network"]["controller"].split(":")
    assert by["Service", host]["spec"]["ports"][0]["port"] == int(port), "the controller's port"
    how = "hold against their schemas and" if kubernetes_validate else "(schemas left out: the package kubernetes-validate is not there)"
    print(f"{path}: {len(documents)} objects {how} agree with each other")


for path in sys.argv[1:]:
    check(path)
