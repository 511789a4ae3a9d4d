"""Holds a Grafana dashboard against the manual of metrics: check_dashboard.py DASHBOARD.json metrics.md

Every metric it asks for is in the manual, and as the kind it is used as: rates of counters, quantiles and means of histograms. Every metric of the manual is shown. Panels
have titles, descriptions and units, do not overlap, and stay within the grid."""

import json
import re
import sys

dashboard, manual = sys.argv[1:]
board = json.load(open(dashboard))
kinds = dict(re.findall(r"^\| `(volley_\w+)` \| (\w+)", open(manual).read(), re.M))
assert kinds, f"{manual} lists no metrics"
seen, taken, ids = set(), set(), set()
for panel in board["panels"]:
    title = panel["title"]
    assert title and panel["id"] not in ids, f"{title}: no title, or an id twice"
    ids.add(panel["id"])
    at = panel["gridPos"]
    cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
    assert at["x"] + at["w"] <= 24 and not cells & taken, f"{title}: over the edge, or over another panel"
    taken |= cells
    if panel["type"] == "row":
        continue
    assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], f"{title}: no description or unit"
    for target in panel["targets"]:
        expression = target["expr"]
        assert expression.count("(") == expression.count(")"), f"{title}: {expression}"
        names = re.findall(r"volley_\w+", expression)
        assert names and target["legendFormat"], f"{title}: {expression}"
        for name in names:
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            if kinds.get(base) == "histogram":
                assert name != base and re.search(rf"rate\({name}\{{", expression), f"{title}: {name} is a histogram"
                name = base
            assert name in kinds, f"{title}: there is no metric {name} in {manual}"
            if kinds[name] == "counter":
                assert re.search(rf"(rate|increase)\({name}\{{", expression), f"{title}: {name} is a counter and wants a rate"
            seen.add(name)
missing = sorted(set(kinds) - seen)
assert not missing, f"{dashboard} does not show {missing}"
print(f"{dashboard}: {len(board['panels'])} panels, all {len(seen)} metrics of {manual}")
