"""What happens when a process is killed: a rank in the middle of a generation, a build at any moment."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import ROOT, SEED
from support.checkpoints import make_model
from support.processes import assert_user_error, build, run
from support.waiting import PATIENCE, until

from cqil_trt import engine as engine_directory
from cqil_trt import files
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError


def processes(marker: str) -> dict[int, str]:
    """Command lines of live processes that mention `marker`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if marker in text:
                found[int(entry.name)] = text
    return found


def start(*command, **options):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [str(part) for part in command], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, **options,
    )  # fmt: skip


@pytest.fixture
def generating(tmp_path, request):
    """A job of three ranks in the middle of a long generation; the placement is the test's parameter."""
    make_model(tmp_path / "model", max_position_embeddings=4096)
    engine = tmp_path / "engine"
    arguments = ("--p", 3, "--placement", request.param, "--max-seq-len", 4096, "--output", engine)
    assert build("--model", tmp_path / "model", *arguments).returncode == 0
    (tmp_path / "ids.json").write_text("[5, 6, 7]")
    job = start(
        "mpirun", "-n", 3, sys.executable, "runtime/run.py", "--engine", engine, "--token-ids",
        tmp_path / "ids.json", "--max-new-tokens", 4000, "--benchmark", start_new_session=True,
    )  # fmt: skip
    try:
        # The line about the engine is printed once it is loaded; generation of 4,000 tokens takes far longer.
        assert "p=3" in job.stdout.readline()
        time.sleep(1)
        ranks = {p: t for p, t in processes(str(engine)).items() if "mpirun" not in t and "hydra" not in t}
        assert len(ranks) == 3 and job.poll() is None
        yield job, sorted(ranks), str(engine)
    finally:
        job.kill()


def assert_ends(job, marker):
    """The job ends within 10 seconds, not well, and leaves no process."""
    began = time.monotonic()
    assert job.wait(timeout=10) != 0
    while processes(marker) and time.monotonic() - began < 10:
        time.sleep(0.1)
    assert not processes(marker)


@pytest.mark.slow
@pytest.mark.parametrize("generating, victim", [("sharded", 1), ("sharded", 0), ("leader", 2)], indirect=["generating"])
def test_a_killed_rank_ends_the_whole_job(generating, victim):
    job, ranks, marker = generating
    os.kill(ranks[victim], signal.SIGKILL)
    assert_ends(job, marker)


@pytest.mark.slow
@pytest.mark.parametrize(
    "generating, number", [("sharded", signal.SIGINT), ("leader", signal.SIGTERM)], indirect=["generating"]
)
def test_ctrl_c_ends_the_whole_job(generating, number):
    job, _, marker = generating
    os.killpg(job.pid, number)  # as a terminal sends it
    assert_ends(job, marker)


def test_ctrl_c_before_mpi_has_started_ends_the_whole_job(tmp_path):
    for moment in range(4):
        job = start("mpirun", "-n", 2, sys.executable, "runtime/run.py", "--engine", tmp_path, start_new_session=True)
        time.sleep(random.uniform(0.1, 0.2) + 0.1 * moment)
        os.killpg(job.pid, signal.SIGINT)
        try:
            job.communicate(timeout=PATIENCE)
        finally:
            job.kill()
        assert job.returncode


@pytest.mark.slow
def test_a_build_killed_at_any_moment_leaves_no_engine(tmp_path):
    make_model(tmp_path / "model", num_hidden_layers=8, hidden_size=384, intermediate_size=1536, head_dim=64)
    command = (sys.executable, "builders/build.py", "--model", tmp_path / "model", "--probes", "never")
    arguments = (*command, "--output", tmp_path / "out")
    began = time.monotonic()
    assert start(*arguments).wait() == 0
    whole = time.monotonic() - began
    Engine.open(tmp_path / "out").verify_rank(0)
    assert start(*arguments, "--force").wait() == 0

    chance = random.Random(SEED)
    for number in range(6):
        target = tmp_path / f"killed{number}"
        job = start(*arguments[:-1], target)
        time.sleep(whole * chance.uniform(0.5, 1.0))
        job.kill()
        job.wait()
        # Either the build was through, or there is nothing under its name.
        if target.exists():
            engine = Engine.open(target)
            for rank in range(engine.world_size):
                engine.verify_rank(rank)
        else:
            with pytest.raises(UserError):
                Engine.open(target)
        # The next build of that name clears what the killed one left.
        assert start(*arguments[:-1], target, "--force").wait() == 0
        assert not [entry for entry in tmp_path.iterdir() if f"{target.name}-" in entry.name]


def test_a_stop_while_the_directory_is_made_removes_it(tmp_path, monkeypatch):
    lock = engine_directory._lock

    def interrupted_and_locked(directory):
        assert directory.is_dir()
        signal.raise_signal(signal.SIGINT)
        return lock(directory)

    monkeypatch.setattr(engine_directory, "_lock", interrupted_and_locked)
    # A job in the background of a shell ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with engine_directory.new_directory(tmp_path / "out", force=False):
                raise AssertionError("went on")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), ("mpirun", "-n", 2)])
def test_a_build_that_is_asked_to_stop_cleans_up(launcher, tmp_path):
    make_model(tmp_path / "model", num_hidden_layers=8, hidden_size=384, intermediate_size=1536, head_dim=64)
    command = (*launcher, sys.executable, "builders/build.py", "--model", tmp_path / "model", "--p", 2)
    for stop in (signal.SIGINT, signal.SIGTERM):
        job = start(*command, "--output", tmp_path / "out")
        while job.poll() is None and not list(tmp_path.glob(".building-*")):
            time.sleep(0.005)
        job.send_signal(stop)
        code = job.wait(timeout=20)
        assert (code != 0 if launcher else code == 128 + stop) or (tmp_path / "out").exists()
        if launcher:  # ranks are killed, and a process that outlives them removes what they wrote
            until(lambda: not list(tmp_path.glob(".building-*")))
        assert not list(tmp_path.glob(".building-*"))
        if (tmp_path / "out").exists():  # the build was through, if not the process
            Engine.open(tmp_path / "out")
            break


def test_a_build_does_not_replace_what_another_one_built_meanwhile(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(UserError, match=re.escape(f"--output {path}: exists already (--force replaces it)")):
        with engine_directory.new_directory(path, force=False) as second:
            engine_directory.write_config(second, {"build": 2})
            with engine_directory.new_directory(path, force=False) as first:
                engine_directory.write_config(first, {"build": 1})
    assert json.loads((path / "config.json").read_text())["build"] == 1
    with engine_directory.new_directory(path, force=True) as third:
        engine_directory.write_config(third, {"build": 3})
    assert json.loads((path / "config.json").read_text())["build"] == 3
    assert list(tmp_path.iterdir()) == [path]


def test_ranks_that_cannot_write_end_with_one_line(tmp_path):
    """Rank 1 alone, in the middle of a file. The limit is set once MPI has its own files."""
    make_model(tmp_path / "model")
    program = (
        "import resource; from cqil_trt.commands.build import main; from cqil_trt.job import Job\n"
        "if Job().rank == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "main()"
    )
    arguments = ("--model", tmp_path / "model", "--p", 2, "--probes", "never", "--output", tmp_path / "out")
    done = run("mpirun", "-n", 2, sys.executable, "-c", program, *arguments)
    assert_user_error(done, f"--output {tmp_path / 'out'}: cannot be written (File too large)")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@contextmanager
def limited_files(size):
    """Files that this process writes end at `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    path, new = tmp_path / "report.json", tmp_path / "new.json"
    files.write_json(path, {"old": 1})
    path.chmod(0o640)
    with limited_files(1000):
        for target in (path, new):
            with pytest.raises(UserError, match=f"^--json {target}: cannot be written .File too large.$"):
                files.write_file(target, bytes(2000), "--json")
    assert list(tmp_path.iterdir()) == [path] and json.loads(path.read_text()) == {"old": 1}

    (tmp_path / "link").symlink_to("report.json")
    files.write_json(tmp_path / "link", {"new": 2})
    assert (tmp_path / "link").is_symlink() and json.loads(path.read_text()) == {"new": 2}
    assert path.stat().st_mode & 0o777 == 0o640
    files.write_file(Path("/dev/null"), b"written in place")
    assert Path("/dev/null").is_char_device()
    assert {entry.name for entry in tmp_path.iterdir()} == {"report.json", "link"}
