"""Jobs: one at a time, found again by a page, a tab or a server that comes later."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from studio_kit import until

from weightsmith.cli.main import main
from weightsmith.core.errors import OutputError, SourceError
from weightsmith.studio.jobs import Job, Jobs
from weightsmith.studio.pages.run import told
from weightsmith.studio.seal import sealed

PLUGIN = (Path(__file__).parents[1] / "cli/example_plugin.py").read_text()


@pytest.fixture
def jobs(folder: Path) -> Iterator[Jobs]:
    made = Jobs(folder / ".weightsmith-studio", folder)
    made.open()
    yield made
    made.close()


def ended(jobs: Jobs, number: str) -> Job:
    return until(lambda: job if (job := jobs.get(number)).over else None)  # type: ignore[no-any-return]


def slow(folder: Path) -> list[str]:
    """The words of a command that runs until it is stopped: it reads a pipe that nobody writes to."""
    pipe = folder / "pipe"
    if not pipe.exists():
        os.mkfifo(pipe)
    plugin = folder / "wait.py"
    plugin.write_text(f"open({str(pipe)!r}).read()\n{PLUGIN}")
    return ["merge", "blend.yaml", "slow", "--plugin", "wait.py"]


def test_a_merge_runs_verifies_and_is_shown(client: TestClient, folder: Path) -> None:
    answer = client.post("/recipe/run", data={"path": "blend.yaml", "out": "merged"})
    assert answer.headers["location"] == "/run/0001"
    jobs = client.app.app.state.studio.jobs  # type: ignore[attr-defined]
    assert ended(jobs, "0001").state == "finished"
    page = client.get("/run/0001").text
    assert "weightsmith merge blend.yaml merged" in page
    assert "Verify" in page
    assert (folder / "merged/model.safetensors").exists()
    where = client.post("/verify", data={"out": "merged"}).headers["location"]
    assert ended(jobs, where.rpartition("/")[2]).state == "finished"
    assert "as it was written" in client.get(where).text
    with client.stream("GET", "/run/0001/events") as stream:
        lines = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line]
    assert lines[-1]["state"] == "finished"
    assert lines[-1]["share"] == 1
    assert "merged" in client.get("/models").text
    listed = client.get("/run", headers={"hx-request": "true"}).text
    assert listed.count("finished") >= 2
    assert "<html" not in listed


def test_a_failed_job_says_why(jobs: Jobs) -> None:
    job = ended(jobs, jobs.add(["merge", "nothing.yaml", "x"], "x").id)
    assert (job.state, job.code) == ("failed", 2)
    assert "no such recipe file" in job.log()
    assert job.resumable


def test_one_at_a_time_and_the_others_wait(jobs: Jobs, folder: Path) -> None:
    first, second, third = (
        jobs.add(slow(folder), "slow"),
        jobs.add(["verify", "models"], "b"),
        jobs.add(["plan", "blend.yaml"], "c"),
    )
    until(lambda: jobs.get(first.id).state == "running")
    assert [job.state for job in jobs.all()] == ["queued", "queued", "running"]
    assert (jobs.stop(second.id).state, told(jobs.get(second.id))) == ("stopped", "taken out of the queue")
    with pytest.raises(OutputError, match="only one that was stopped"):
        jobs.resume(first.id)
    until((jobs.folder / first.id / "pid").exists)
    jobs.stop(first.id)
    assert ended(jobs, first.id).state == "stopped"
    assert ended(jobs, third.id).state == "finished"
    jobs.remove(second.id)
    with pytest.raises(SourceError, match="no job"):
        jobs.get(second.id)


def test_a_server_that_comes_later_finds_the_running_job(jobs: Jobs, folder: Path) -> None:
    job = jobs.add(slow(folder), "slow")
    until((jobs.folder / job.id / "pid").exists)
    other = Jobs(folder / ".weightsmith-studio", folder)  # as after a kill: it knows nothing but the folder
    assert other.get(job.id).state == "running"
    queued = other.add(["plan", "blend.yaml"], "plan")
    other._next()
    assert other.get(queued.id).state == "queued"
    other.stop(job.id)
    assert ended(other, job.id).state == "stopped"


def test_a_killed_job_goes_on_with_resume(jobs: Jobs, folder: Path) -> None:
    job = jobs.add(slow(folder), "slow")
    pid = until(lambda: (jobs.folder / job.id / "pid").exists() and int((jobs.folder / job.id / "pid").read_text()))
    os.kill(pid, signal.SIGKILL)
    assert ended(jobs, job.id).state == "interrupted"
    (folder / "wait.py").write_text(PLUGIN)
    again = jobs.resume(job.id)
    assert again.command.endswith("--plugin wait.py --resume")
    assert ended(jobs, job.id).state == "finished"
    assert (folder / "slow/weightsmith.json").exists()


def test_a_folder_from_elsewhere_brings_no_commands(jobs: Jobs, folder: Path, tmp_path: Path) -> None:
    """Jobs that somebody else has put into the folder are neither shown nor run."""
    (folder / "wait.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n{PLUGIN}")
    noted = {"words": ["merge", "blend.yaml", "x", "--plugin", "wait.py"], "title": "x", "created": 0.0, "about": {}}
    changed = sealed("0006", {**noted, "words": ["plan", "blend.yaml"]})
    strange = {
        "0004": json.dumps(noted).encode(),
        "0005": json.dumps({**noted, "seal": "0" * 64}).encode(),  # of another user
        "0006": changed.replace(b'["plan", "blend.yaml"]', b'["merge"]'),
        "0007": sealed("0003", noted),
    }
    for number, raw in strange.items():
        (jobs.folder / number).mkdir()
        (jobs.folder / number / "job.json").write_bytes(raw)
    after = jobs.add(["plan", "blend.yaml"], "plan")
    assert after.id == "0008"
    assert ended(jobs, after.id).state == "finished"
    assert [job.id for job in jobs.all()] == ["0008"]
    assert not (tmp_path / "pwned").exists()
    for number in strange:
        with pytest.raises(SourceError, match="no job"):
            jobs.resume(number)


def test_links_among_the_studios_own_files_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / ".weightsmith-studio").mkdir()
    (folder / ".weightsmith-studio/running").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="running: a link"):
        Jobs(folder / ".weightsmith-studio", folder)


def test_a_server_that_is_stopped_stops_its_job(jobs: Jobs, folder: Path) -> None:
    job = jobs.add(slow(folder), "slow")
    until((jobs.folder / job.id / "pid").exists)
    jobs.close()
    assert ended(jobs, job.id).state == "stopped"


def test_a_command_writes_how_far_it_is_where_it_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "progress"
    monkeypatch.setenv("WEIGHTSMITH_PROGRESS", str(file))
    assert main(["merge", str(folder / "blend.yaml"), str(folder / "merged"), "--json"]) == 0
    noted = json.loads(file.read_text())
    assert noted["done"] == noted["total"] > 0
    assert noted["unit"] == "bytes"
    assert not list(folder.glob(".progress*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ending_under_an_open_page_says_one_line(folder: Path, number: int) -> None:
    """A page that follows a job does not hold the server, nor fill the terminal."""
    jobs = Jobs(folder / ".weightsmith-studio", folder)
    job = jobs.add(slow(folder), "slow")
    words = [sys.executable, "-m", "weightsmith", "studio", str(folder), "--no-browser", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        browser.open(found[0]).close()
        until((jobs.folder / job.id / "pid").exists)
        with browser.open(f"{found[0].partition('/?')[0]}/run/{job.id}/events") as stream:
            assert stream.readline().startswith(b"data: ")
            server.send_signal(number)
            assert stream.read().endswith(b"event: ending\ndata: \n\n")
        assert server.communicate()[1] == "interrupted\n"
    assert server.returncode == 130
    assert ended(jobs, job.id).state == "stopped"


def test_a_second_click_shows_the_job_that_the_first_has_made(client: TestClient, folder: Path) -> None:
    """What waits or runs already is not queued again; another text, or another output, is another job."""
    slow_one = jobs_of(client).add(slow(folder), "slow")
    where = [
        client.post("/recipe/run", data={"path": "blend.yaml", "out": out}).headers["location"]
        for out in ("merged", "merged", "other", "./merged/")
    ]
    assert where == ["/run/0002", "/run/0002", "/run/0003", "/run/0002"]
    (folder / "blend.yaml").write_text((folder / "blend.yaml").read_text() + "seed: 3\n")
    refused = client.post("/recipe/run", data={"path": "blend.yaml", "out": "merged"})
    assert refused.status_code == 400
    assert "job 0002 is about to write merged" in refused.text
    replacing = client.post("/recipe/run", data={"path": "blend.yaml", "out": "merged", "overwrite": "yes"})
    assert replacing.headers["location"] == "/run/0004"
    for number in ("0002", "0003", "0004"):
        jobs_of(client).stop(number)
    assert client.post("/run/0002/resume").headers["location"] == "/run/0002"
    assert client.post("/run/0002/resume").headers["location"] == "/run/0002"  # it waits already
    jobs_of(client).stop("0002")
    for _ in range(2):
        assert client.post("/run/0002/remove").headers["location"] == "/run"
    jobs_of(client).stop(slow_one.id)


def jobs_of(client: TestClient) -> Jobs:
    return client.app.app.state.studio.jobs  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("killed", ["command", "runner"])
def test_a_killed_process_shows_on_the_page_at_once(client: TestClient, folder: Path, killed: str) -> None:
    """Also where what was killed is the process that looks after the command, which itself would go on."""
    jobs = jobs_of(client)
    job = jobs.add(slow(folder), "slow")
    pid = int(until(lambda: (job.folder / "pid").exists() and (job.folder / "pid").read_text()))
    number = pid if killed == "command" else os.getpgid(pid)  # the runner leads the group
    assert client.get(f"/run/{job.id}").text.count("running") > 0
    os.kill(number, signal.SIGKILL)
    began = time.monotonic()
    until(lambda: jobs.get(job.id).over)
    assert time.monotonic() - began < 20  # the pipe that it reads has no writer: it would go on for ever
    assert jobs.get(job.id).state == "interrupted"
    assert "Resume" in client.get(f"/run/{job.id}").text
