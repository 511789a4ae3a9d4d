"""Parses Kubernetes manifests and holds them against each other: names that are referred to exist, labels match selectors, probes and services name ports that
are there, the embedded volley.toml agrees with the numbers of replicas. It is no schema check."""

import sys
import tomllib

import yaml


def check(path):
    documents = [document for document in yaml.safe_load_all(open(path)) if document]
    by = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    assert len(by) == len(documents), f"{path}: a name twice"
    sets = [d for d in documents if d["kind"] == "StatefulSet"]
    labels = [d["spec"]["template"]["metadata"]["labels"] for d in sets]
    config = tomllib.loads(by["ConfigMap", "volley"]["data"]["volley.toml"])
    for d in sets:
        name, spec = d["metadata"]["name"], d["spec"]
        pod = spec["template"]["spec"]
        assert ("Service", spec["serviceName"]) in by, f"{name}: no service {spec['serviceName']}"
        assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items(), name
        (container,) = pod["containers"]
        ports = {port["name"] for port in container["ports"]}
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"]:
            if probe in container:
                assert container[probe]["httpGet"]["port"] in ports, f"{name}: {probe}"
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}, f"{name}: volumes"
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in by, name
        role = container["args"][1] if container["args"][0] == "worker" else None
        if role:
            assert spec["replicas"] == config["cluster"][f"{role}_workers"], f"{name}: replicas"
    for d in documents:
        if d["kind"] == "Service":
            selector = d["spec"]["selector"]
            assert any(selector.items() <= label.items() for label in labels), f"{d['metadata']['name']} selects nothing"
        if d["kind"] == "PodDisruptionBudget":
            selector = d["spec"]["selector"]["matchLabels"]
            assert any(selector.items() <= label.items() for label in labels), f"{d['metadata']['name']} selects nothing"
    host, port = config["network"]["controller"].split(":")
    assert by["Service", host]["spec"]["ports"][0]["port"] == int(port), "the controller's port"
    print(f"{path}: {len(documents)} objects agree with each other")


for path in sys.argv[1:]:
    check(path)
