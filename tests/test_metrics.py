"""Prometheus metrics, and the dashboard that reads them."""

import json
import math
import re
import time
import timeit

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import ROOT

from cqil_trt.serving.metrics import FINISH_REASONS, REFUSE_REASONS, Metrics, token_buckets

MODEL = "org/model-1"

# Name in the exposition's TYPE line and kind. Counters are named without _total only inside prometheus_client.
EXPECTED = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prompt_tokens_total": "counter",
    "vllm:generation_tokens_total": "counter",
    "vllm:prefix_cache_queries_total": "counter",
    "vllm:prefix_cache_hits_total": "counter",
    "vllm:spec_decode_num_drafts_total": "counter",
    "vllm:spec_decode_num_draft_tokens_total": "counter",
    "vllm:spec_decode_num_accepted_tokens_total": "counter",
    "vllm:request_success_total": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:iteration_tokens_total": "histogram",
    "cqil:step_seconds": "histogram",
    "cqil:requests_refused_total": "counter",
    "cqil:healthy": "gauge",
    "cqil:rank_last_seen_seconds": "gauge",
}
# Labels that Prometheus adds to every series.
SCRAPE_LABELS = {"instance", "job"}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def text(metrics):
    return metrics.exposition()[0].decode()


def samples(metrics):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text(metrics))
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(metrics, name, **labels):
    return samples(metrics)[name, tuple(sorted({"model_name": MODEL, **labels}.items()))]


def used(metrics):
    """Call every method once with plain values."""
    metrics.refused("queue_full")
    metrics.request_started(70)
    metrics.queued(0.0003)
    metrics.prefix(70, 64)
    metrics.first_token(0.012)
    metrics.token(0.0011)
    metrics.tokens([0.0009, 0.0013])
    metrics.step(4, 0.0011)
    metrics.step(512)
    metrics.finished("length", 0.0153, 70, 4, 0.0117, 0.0033)
    metrics.gauges(3, 2, 0.25, True)
    metrics.rank_seen(0, 0.5)
    metrics.rank_seen(1, 2.0)
    return metrics


@pytest.fixture
def metrics():
    return Metrics(MODEL, clock=Clock())


# Exposition.


def test_names_and_kinds(metrics):
    body, content_type = metrics.exposition()
    assert content_type.startswith("text/plain; version=0.0.4")
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", body.decode(), re.MULTILINE))
    assert {name: kind for name, kind in kinds.items() if not name.endswith("_created")} == EXPECTED


def test_every_series_has_the_model_name(metrics):
    for _, labels in samples(used(metrics)):
        assert dict(labels)["model_name"] == MODEL


def test_values(metrics):
    used(metrics)
    assert value(metrics, "cqil:requests_refused_total", reason="queue_full") == 1
    assert value(metrics, "vllm:prompt_tokens_total") == 70
    assert value(metrics, "vllm:generation_tokens_total") == 4
    assert value(metrics, "vllm:prefix_cache_queries_total") == 70
    assert value(metrics, "vllm:prefix_cache_hits_total") == 64
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:num_requests_waiting") == 2
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25
    assert value(metrics, "cqil:healthy") == 1
    for name, count, total in (
        ("vllm:time_to_first_token_seconds", 1, 0.012),
        ("vllm:inter_token_latency_seconds", 3, 0.0033),
        ("vllm:e2e_request_latency_seconds", 1, 0.0153),
        ("vllm:request_queue_time_seconds", 1, 0.0003),
        ("vllm:request_prefill_time_seconds", 1, 0.0117),
        ("vllm:request_decode_time_seconds", 1, 0.0033),
        ("vllm:request_prompt_tokens", 1, 70),
        ("vllm:request_generation_tokens", 1, 4),
        ("vllm:iteration_tokens_total", 2, 516),
        ("cqil:step_seconds", 1, 0.0011),
    ):
        assert value(metrics, f"{name}_count") == count, name
        assert value(metrics, f"{name}_sum") == pytest.approx(total), name
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.001") == 1
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.00125") == 2
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.0015") == 3
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="+Inf") == 3


def test_drafts_are_counted(metrics):
    metrics.drafts(2, 9, 4)
    metrics.drafts(1, 7, 0)
    assert value(metrics, "vllm:spec_decode_num_drafts_total") == 3
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total") == 16
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 4


def test_listed_reasons_start_at_zero(metrics):
    for reason in FINISH_REASONS:
        assert value(metrics, "vllm:request_success_total", finished_reason=reason) == 0
    for reason in REFUSE_REASONS:
        assert value(metrics, "cqil:requests_refused_total", reason=reason) == 0
    assert "other" not in text(metrics)


def test_every_listed_reason_is_counted_as_itself(metrics):
    for reason in FINISH_REASONS:
        metrics.finished(reason, 1.0, 1, 1)
        assert value(metrics, "vllm:request_success_total", finished_reason=reason) == 1
    for reason in REFUSE_REASONS:
        metrics.refused(reason)
        assert value(metrics, "cqil:requests_refused_total", reason=reason) == 1
    assert "other" not in text(metrics)


def test_unlisted_reason_is_other(metrics):
    metrics.finished("tool_calls", 1.0, 1, 1)
    metrics.refused("whim")
    assert value(metrics, "vllm:request_success_total", finished_reason="other") == 1
    assert value(metrics, "cqil:requests_refused_total", reason="other") == 1


@pytest.mark.parametrize("bad", [math.nan, -1, math.inf, -math.inf])
def test_bad_values_are_dropped(metrics, bad):
    before = samples(metrics)
    metrics.request_started(bad)
    metrics.queued(bad)
    metrics.prefix(bad, bad)
    metrics.step(bad, bad)
    metrics.gauges(bad, bad, bad, False)
    metrics.rank_seen(0, bad)
    assert samples(metrics) == before
    # Here the event counts, its value does not.
    metrics.first_token(bad)
    metrics.token(bad)
    metrics.tokens([bad, 0.001, bad])
    metrics.finished("error", bad, bad, bad, bad, bad)
    assert value(metrics, "vllm:generation_tokens_total") == 5
    assert value(metrics, "vllm:request_success_total", finished_reason="error") == 1
    changed = {name for (name, labels), v in samples(metrics).items() if v != before.get((name, labels))}
    assert {name for name in changed if not name.startswith("vllm:inter_token_latency_seconds_")} == {
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
    }
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 1
    assert value(metrics, "vllm:inter_token_latency_seconds_sum") == 0.001


def test_phase_not_reached_is_not_recorded(metrics):
    metrics.finished("abort", 0.1, 10, 0)
    assert value(metrics, "vllm:request_prefill_time_seconds_count") == 0
    assert value(metrics, "vllm:request_decode_time_seconds_count") == 0
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 1


def test_rank_age_grows_until_seen_again():
    clock = Clock()
    metrics = Metrics(MODEL, clock=clock)
    metrics.rank_seen(3, 0.5)
    assert value(metrics, "cqil:rank_last_seen_seconds", rank="3") == pytest.approx(0.5)
    clock.now += 7
    assert value(metrics, "cqil:rank_last_seen_seconds", rank="3") == pytest.approx(7.5)
    metrics.rank_seen(3)
    assert value(metrics, "cqil:rank_last_seen_seconds", rank="3") == 0


def test_no_global_state():
    first, second = Metrics(MODEL), Metrics(MODEL)
    first.token(0.001)
    assert value(first, "vllm:generation_tokens_total") == 1
    assert value(second, "vllm:generation_tokens_total") == 0


def test_odd_model_name_survives():
    name = 'a "b" \\ c\nd'
    (family,) = (f for f in text_string_to_metric_families(text(Metrics(name))) if f.name == "cqil:healthy")
    assert family.samples[0].labels == {"model_name": name}


def test_token_buckets():
    assert token_buckets(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_buckets(99) == (1, 2, 5, 10, 20, 50)
    assert token_buckets(0) == (1,)


@pytest.mark.parametrize("interval", [0.001, 9.0, 20.0])
def test_token_path_is_cheap(metrics, interval):
    """Well above the 2 µs aimed at, and of this thread's own time, so that a busy machine does not fail it."""

    def microseconds(call, events):
        return min(timeit.repeat(call, timer=time.thread_time, number=2000, repeat=5)) / 2000 / events * 1e6

    batch = [interval] * 8
    assert microseconds(lambda: metrics.token(interval), 1) < 10
    assert microseconds(lambda: metrics.tokens(batch), 8) < 10


# Dashboard.

DASHBOARD = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text(encoding="utf-8"))
PROMQL_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan", "by", "without", "on", "ignoring"}


def panels():
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def targets():
    """Return (expression, legend) of every target."""
    return [(target["expr"], target["legendFormat"]) for panel in panels() for target in panel["targets"]]


def walk(node):
    if isinstance(node, dict):
        for key, child in node.items():
            yield key, child
            yield from walk(child)
    elif isinstance(node, list):
        for child in node:
            yield from walk(child)


def metric_names(promql):
    """Return the metrics that an expression reads."""
    promql = re.sub(r'"(?:\\.|[^"\\])*"', "", promql)
    promql = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", promql)
    promql = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", promql)
    words = re.findall(r"(?<![\w:.$])[A-Za-z_:][\w:]*(?![\w:]|\s*\()", promql)
    return {word for word in words if word.lower() not in PROMQL_WORDS}


def label_names(promql):
    """Return the labels that an expression selects or groups by."""
    bare = re.sub(r'"(?:\\.|[^"\\])*"', '""', promql)
    names = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*""', bare))
    for group in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", bare):
        names.update(name.strip() for name in group.split(",") if name.strip())
    return names


def exposed_labels():
    """Return the labels of every series that a used Metrics exposes, by series name."""
    labels = {}
    for name, pairs in samples(used(Metrics(MODEL))):
        labels.setdefault(name, set()).update(key for key, _ in pairs)
    return labels


def variable(name):
    [found] = [v for v in DASHBOARD["templating"]["list"] if v["name"] == name]
    return found


def test_metric_names_finds_them():
    assert metric_names('sum by (le, a) (rate(x:y_bucket{m=~"$m", b="c"}[$__rate_interval])) / (z > 0)') == {
        "x:y_bucket",
        "z",
    }
    assert metric_names("a_total / on (k) group_left (l) b unless c:d offset 5m") == {"a_total", "b", "c:d"}
    assert metric_names("histogram_quantile(0.9, sum by (le) (rate(q[5m]))) or vector(1e3)") == {"q"}
    assert label_names('sum by (le, a) (rate(x{m=~"$m", b!="c=d"}[5m]))') == {"le", "a", "m", "b"}


def test_dashboard_reads_only_exposed_metrics():
    exposed = exposed_labels()
    for expr, _ in targets():
        names = metric_names(expr)
        assert names, expr
        assert names <= exposed.keys(), f"{names - exposed.keys()} in {expr}"


def test_dashboard_reads_only_exposed_labels():
    exposed = exposed_labels()
    for expr, legend in targets():
        labels = label_names(expr) | set(re.findall(r"\{\{\s*(\w+)\s*\}\}", legend))
        for name in metric_names(expr):
            missing = labels - exposed[name] - SCRAPE_LABELS
            assert not missing, f"{missing} in {expr} / {legend}"


def test_no_expression_is_missed():
    assert [child for key, child in walk(DASHBOARD) if key == "expr"] == [expr for expr, _ in targets()]


def test_expressions_parse():
    parser = pytest.importorskip("promql_parser", reason="pip install promql-parser to check the syntax")
    for expr, _ in targets():
        parser.parse(expr.replace("$__rate_interval", "1m"))


def test_every_expression_follows_the_model_variable():
    for expr, _ in targets():
        assert expr.count('model_name=~"$model_name"') == len(re.findall(r"(?:vllm|cqil):\w+", expr)), expr


def test_variables():
    datasource, model = variable("datasource"), variable("model_name")
    assert (datasource["type"], datasource["query"]) == ("datasource", "prometheus")
    match = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", model["query"]["query"])
    assert match
    assert match[2] in exposed_labels()[match[1]]
    assert model["definition"] == model["query"]["query"]
    known = {"datasource", "model_name", "__rate_interval", "__all"}
    for key, child in walk(DASHBOARD):
        if isinstance(child, str):
            assert set(re.findall(r"\$\{?(\w+)", child)) <= known, (key, child)


def test_datasource_is_always_the_variable():
    for panel in panels():
        for holder in (panel, *panel["targets"]):
            assert holder["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_layout():
    assert [p["title"] for p in DASHBOARD["panels"] if p["type"] == "row"] == ["Traffic", "Latency", "Cache", "Health"]
    assert DASHBOARD["id"] is None
    assert DASHBOARD["schemaVersion"] >= 38
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    cells = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        area = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & area, panel["title"]
        cells |= area


def test_the_example_of_prometheus_reads_what_a_server_gives():
    yaml = pytest.importorskip("yaml", reason="needs pyyaml")
    [job] = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    assert (job["metrics_path"], job["scheme"]) == ("/metrics", "http")
    assert job["static_configs"] == [{"targets": ["localhost:8000"]}]  # serve.py's default port
