"""slurm_scripts/ under real Slurm on several hosts: serve, drain, fail, and nothing that hangs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

Cluster = Any  # of conftest.py, which tests do not import
Job = Any

SERVE = Path(__file__).parents[2] / "slurm_scripts" / "serve.sbatch"
URL = "http://n1:8000/v1/completions"
READY_SECONDS = 60.0
CLIENT = """
import sys, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
for line in urllib.request.urlopen(request, timeout=60):
    print(line.decode(), end="", flush=True)
"""
pytestmark = [pytest.mark.slow, pytest.mark.multi_rank, pytest.mark.cluster]


def client(cluster: Cluster, **fields: object) -> subprocess.Popen[str]:
    """A process on ctl, which runs no rank, that prints the answer as it comes."""
    body = {"model": "tiny_model", "prompt": "Once", "temperature": 0, "ignore_eos": True, **fields}
    command = cluster.ctl.command(sys.executable, "-c", CLIENT, URL, json.dumps(body))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start(cluster: Cluster, tasks: int, *flags: str) -> Job:
    """A job that serves the embedded model on n1 and n2, with `tasks` ranks on each."""
    ranks = str(2 * tasks)
    shape = ("--nodes=2", f"--ntasks-per-node={tasks}", "--cpus-per-task=1")
    layout = ("--device", "cpu", "--tp-size", ranks, "--ep-size", ranks, "--enable-attention-dp")
    return cluster.submit(*shape, str(SERVE), *layout, "--host", "n1", *flags)


def wait_ready(job: Job) -> None:
    job.wait(lambda: "API " in job.output, READY_SECONDS)


@pytest.mark.parametrize(
    ("tasks", "signal"),
    [(2, ["--signal=TERM"]), (1, ["--signal=TERM", "--batch"])],
    ids=["2 tasks a node, told by a person", "1 task a node, told at the time limit"],
)
def test_serves_other_hosts_and_drains(cluster: Cluster, tasks: int, signal: list[str]) -> None:
    job = start(cluster, tasks)
    wait_ready(job)
    hosts = [f"rank={rank} host=n{1 + rank // tasks}" for rank in range(1, 2 * tasks)]
    assert all(host in job.output for host in hosts)
    answer, _ = client(cluster, max_tokens=8).communicate(timeout=30)
    assert json.loads(answer)["usage"]["completion_tokens"] == 8

    stream = client(cluster, max_tokens=40, stream=True)
    assert stream.stdout is not None and stream.stdout.readline().startswith("data: {")
    cluster.ctl.run("scancel", *signal, job.number)
    job.wait(lambda: "draining: 1 requests run" in job.output, 10)
    chunks, _ = stream.communicate(timeout=60)
    assert chunks.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in chunks
    end = job.wait_end(20)
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), job.output


def test_a_killed_rank_fails_the_job_at_once(cluster: Cluster) -> None:
    job = start(cluster, 2)
    wait_ready(job)
    rows = cluster.nodes["n2"].run("scontrol", "listpids", f"{job.number}.0", "n2").splitlines()
    (process,) = [row.split()[0] for row in rows if row.split()[-1:] == ["3"]]  # the last column: rank
    cluster.nodes["n2"].run("kill", "-KILL", process)
    killed = time.monotonic()
    end = job.wait_end(20)
    assert time.monotonic() - killed < 10
    assert end["JobState"] == "FAILED" and end["ExitCode"] != "0:0"
    assert end["Requeue"] == "0"


def test_a_job_told_to_stop_while_it_starts_does_not_wait_for_its_ranks(cluster: Cluster) -> None:
    job = start(cluster, 1)
    job.wait(lambda: "waits for rank 0" in job.output, READY_SECONDS)
    cluster.ctl.run("scancel", "--signal=TERM", job.number)
    told = time.monotonic()
    job.wait_end(60)
    assert time.monotonic() - told < 15  # Slurm's KillWait, that a deaf rank would take, is 30
