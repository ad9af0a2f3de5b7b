"""The simulated fleet, against formulas of queueing theory."""

import json
import sys

import pytest
from support import ROOT, SEED
from support.needs import need
from support.processes import run

need("simpy")
FLAGS = ("--hosts", "1", "--replicas", "1", "--seed", SEED)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import simulate_fleet

    return simulate_fleet


def simulated(script, *flags, hosts=1):
    options = script.parser().parse_args([str(flag) for flag in (*FLAGS, *flags)])
    curves = script.Curve(options.steps, "--steps"), script.Curve(options.prefill, "--prefill")
    return script.simulate(options, hosts, *curves)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_a_replica_of_one_row_is_an_mg1_queue(script, load):
    """Pollaczek–Khinchine: the mean wait is λ E[S²] / (2 (1 - ρ)), here with S geometric tokens of one millisecond."""
    mean = 50
    # The prompt costs as much as a token, so S = tokens milliseconds; E[S²] of a geometric number is (2 - q) / q².
    rate = load / mean
    flags = ("--steps", "1:1", "--prefill", "1:1", "--rows", 1, "--new-tokens", mean)
    result = simulated(script, *flags, "--rate", 1e3 * rate, "--least-requests", 60_000)
    q = 1 / mean
    expected = rate * (2 - q) / q**2 / (2 * (1 - load))
    assert result.mean_wait == pytest.approx(expected, rel=0.15)
    assert result.rows == pytest.approx(load * (mean - 1) / mean, rel=0.06)  # Little's law, without the first token
    assert all(time == pytest.approx(1) for time in result.between.values())


def test_steps_are_shared_and_nothing_is_lost(script):
    """Where rows and prompts cost nothing more, a request waits for the step under way, and then has its own pace."""
    flags = ("--steps", "1:2,64:2", "--prefill", "1:0,100000:0", "--rows", 64, "--new-tokens", 40)
    result = simulated(script, *flags, "--rate", 100, "--least-requests", 5000)
    assert result.requests == 5000
    assert all(time == pytest.approx(2, rel=1e-6) for time in result.between.values())
    assert result.first["99"] <= 2 + 1e-6  # the step under way


def test_a_curve_is_linear_between_its_points(script):
    curve = script.Curve("1:2,3:4,5:5", "--steps")
    assert [curve(x) for x in (0, 1, 2, 3, 4, 5, 7)] == [2, 2, 3, 4, 4.5, 5, 6]


def test_more_hosts_at_the_same_load_wait_less(script):
    """Of the same load for each, the shorter of two queues is shorter the more there are."""
    alone, many = (simulated(script, "--least-requests", 4000, hosts=hosts) for hosts in (1, 16))
    assert many.first["99"] < alone.first["99"]


@pytest.mark.slow
def test_the_script_prints_saves_and_draws(tmp_path):
    need("matplotlib")
    outputs = ("--json", tmp_path / "found.json", "--plot", tmp_path / "plot.png")
    flags = ("--hosts", "1,3", "--least-requests", 300, *outputs)
    done = run(sys.executable, "scripts/simulate_fleet.py", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["hosts"], row["requests"]) for row in found] == [(1, 300), (3, 720)]  # 60 for each replica
    assert (tmp_path / "plot.png").stat().st_size > 1000
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and lines[2].split()[:2] == ["1", "4"]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--steps 1:2,x", "--steps 1:2,x: expected ascending"),
        ("--prefill 2:1,1:1", "--prefill 2:1,1:1: expected ascending"),
        ("--hosts 0", "--hosts 0: expected numbers"),
        ("--rate 0", "--rate must be above 0"),
        ("--new-tokens 1", "--new-tokens must be at least 2"),
        ("--plot p.doc", "--plot p.doc: its ending is none of"),
    ],
)
def test_refusals_are_one_line(flags, said, refused):
    refused("simulate_fleet", lambda module, options: module.run(options), flags.split(), said)
