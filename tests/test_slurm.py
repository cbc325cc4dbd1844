"""Launches on a real Slurm, which is started here: nothing is lost to limits, preemption or lost machines.

One cluster serves all tests. What happens to each training is a scenario of its own (a function); all of them are under
way at the same time, for most of it is waiting, and a test asks how its own one ended. Scenarios keep to their nodes:
n3 is preempted, n4 is killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import matplotlib
import pytest
from jobs_on_trial import EVALUATION, ended, events, labelled_folder, statuses, step_of, tiny_file, trains, until
from slurm_cluster import SlurmCluster, obstacle
from small_runs import tiny_model, write_run
from training import loss_trace, tiny_config

from dinoreg.commands.main import main
from dinoreg.config.load import load_config, to_yaml
from dinoreg.jobs.records import read_records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
]

STEPS = 60
AT_ONCE = 3  # scenarios; on two cores more would only wait for each other
ELSEWHERE = "exclude=n3,n4,n5,n6"
Done = Callable[[Callable[[SlurmCluster], None]], None]


def launch(*arguments: str) -> None:
    """A launch in a process of its own: it changes its environment, which threads would share."""
    done = subprocess.run([sys.executable, "-m", "dinoreg", "launch", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pretrain(out: str, *options: str, steps: int = STEPS, **changed: object) -> None:
    changed = {"steps": steps, "checkpoint__every": 1000, **changed}
    launch("pretrain", tiny_file(Path(out).name, **changed), f"out={out}", *options)


def job_of(folder: str) -> str:
    return read_records(folder)[-1].job


def tell(folder: str, number: str) -> None:
    subprocess.run(["scancel", f"--signal={number}", job_of(folder)], check=True)


def processes(folder: str) -> list[int]:
    """Processes on the nodes that run a job of this folder."""
    mark = str(Path(folder).resolve() / "launch")
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if "submitit.core._submit" in words and mark in words and "srun" not in words[0]:
            found.append(int(path.parent.name))
    return found


def is_pending(process: int, number: int) -> bool:
    """Whether a signal waits for a process that is stopped."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def hold(folder: str, act: Callable[[], object]) -> None:
    """Stop the process of a training until the request to save that follows from `act` has come."""
    for process in processes(folder):
        with suppress(ProcessLookupError, FileNotFoundError):  # a slow machine: the signal was quicker than this
            os.kill(process, signal.SIGSTOP)
            act()
            until(lambda: is_pending(process, signal.SIGUSR2), "a request to save")  # noqa: B023
            os.kill(process, signal.SIGCONT)


# ------------------------------------------------------------------------------------------------------------
# Scenarios


def limited(cluster: SlurmCluster) -> None:
    """A real limit; the training is stopped until the signal has come, for it is to wait and not to compute."""
    pretrain("limited", "time=2", "signal_delay=20", ELSEWHERE)
    trains("limited", 3)
    hold("limited", lambda: None)


def pair(cluster: SlurmCluster) -> None:
    pretrain("pair", "nodes=2", ELSEWHERE, batch_size=3)
    ended("pair")


def broken_pair(cluster: SlurmCluster) -> None:
    pretrain("broken_pair", "nodes=2", ELSEWHERE, batch_size=3)
    trains("broken_pair", 5)
    tell("broken_pair", "USR2")


def signalled(cluster: SlurmCluster) -> None:
    """The first signal comes while Python is still starting, when a process without handlers would die of it."""
    pretrain("signalled", ELSEWHERE)
    until(lambda: processes("signalled"), "a process")
    tell("signalled", "USR2")
    trains("signalled", 5)
    tell("signalled", "USR2")


def preempted(cluster: SlurmCluster) -> None:
    pretrain("preempted", "slurm_args=[nodelist=n3]", "partition=low")
    trains("preempted", 5)
    options = ["--partition=high", "--nodelist=n3", "--exclusive", "--output=/dev/null"]
    hold("preempted", lambda: cluster.run("sbatch", *options, "--wrap=sleep 1"))


def lost(cluster: SlurmCluster) -> None:
    pretrain("lost", "nodes=2", "exclude=n1,n2,n3", checkpoint__every=5, batch_size=3)
    trains("lost", 12)
    cluster.kill_node("n4")
    until(lambda: len(events("lost", "start")) == 2, "a second start")
    cluster.start_node("n4")


def cancelled(cluster: SlurmCluster) -> None:
    for name in ("at_once", "saved"):
        pretrain(name, ELSEWHERE, steps=1000)
    for name in ("at_once", "saved"):
        trains(name, 3)
    launch("cancel", "at_once")
    launch("cancel", "saved", "save=true")


def doomed(cluster: SlurmCluster) -> None:
    """Its data are gone when it starts."""
    labelled_folder(Path("doomed_data"))
    pretrain("doomed", "slurm_args=[hold]", ELSEWHERE, data__source="doomed_data")
    shutil.rmtree("doomed_data")
    cluster.run("scontrol", "release", job_of("doomed"))


def evaluated(cluster: SlurmCluster) -> None:
    run = write_run(Path("evaluated"), tiny_model())
    for name in ("shapes", "colours", "broken"):
        labelled_folder(Path(name))
    for path in Path("broken").rglob("*.png"):
        path.write_bytes(b"no picture")
    launch("evaluate", "shapes,colours,broken", f"weights={run}", *EVALUATION, ELSEWHERE)


def watched(cluster: SlurmCluster) -> None:
    labelled_folder(Path("beside"))
    pretrain("watched", "evaluate=beside", *(f"evaluate.{item}" for item in EVALUATION), ELSEWHERE, steps=6)
    until(lambda: len(read_records("watched")) == 3, "an evaluation")


SCENARIOS = (limited, preempted, lost, pair, signalled, broken_pair, cancelled, evaluated, watched, doomed)


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    made = SlurmCluster(nodes=6)
    made.start()
    before, here = dict(os.environ), Path.cwd()
    os.environ.update(made.environment, PYTHONPATH=str(Path(__file__).resolve().parents[1]))
    os.environ["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # its list of fonts takes seconds to make
    try:
        os.chdir(made.shared)
        yield made
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
        made.stop()


@pytest.fixture(scope="module")
def done(cluster: SlurmCluster) -> Iterator[Done]:
    """Waits until a scenario has been played; all begin when the first is asked for."""
    pool = ThreadPoolExecutor(AT_ONCE)
    played = {scenario: pool.submit(scenario, cluster) for scenario in SCENARIOS}
    yield lambda scenario: played[scenario].result()
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def unbroken(done: Done) -> list[tuple[float, ...]]:
    """The losses of a training that nobody disturbed, in this process."""
    from dinoreg.train.loop import pretrain as train

    train(tiny_config("unbroken", steps=STEPS, threads=1, checkpoint__every=1000))
    return loss_trace(Path("unbroken"))


# ------------------------------------------------------------------------------------------------------------
# What is refused


def test_an_unknown_partition_is_named_with_the_nearest_and_nothing_is_written(
    cluster: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pretrain", tiny_file("tiny"), "out=refused", "partition=hgh"]) == 2
    line = capsys.readouterr().err.strip()
    assert line == "dinoreg: partition=hgh: unknown here; did you mean high?; known: high, low"
    assert not Path("refused").exists()


def test_what_sbatch_refuses_is_told_in_its_own_words_and_leaves_nothing(
    cluster: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pretrain", tiny_file("tiny"), "out=refused", "gpus_per_node=3"]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("dinoreg: sbatch refused the job: ")
    assert "Requested node configuration is not available" in line
    assert "\n" not in line
    assert not Path("refused").exists()
    assert cluster.run("squeue", "-h", "-o", "%i") == ""


def test_a_run_that_was_to_be_overwritten_survives_a_refusal(cluster: SlurmCluster) -> None:
    Path("precious").mkdir()
    Path("precious/config.yaml").write_text(to_yaml(load_config(None, {"seed": 1})))
    assert main(["launch", "pretrain", tiny_file("tiny"), "overwrite=true", "out=precious", "gpus_per_node=3"]) == 2
    assert [path.name for path in Path("precious").iterdir()] == ["config.yaml"]
    assert not list(Path().glob(".precious*"))


def test_a_dry_run_shows_the_command_and_the_batch_file_and_writes_nothing(
    cluster: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_file("tiny")
    before = sorted(Path().iterdir())
    options = ["dry_run=true", "nodes=2", "gpus_per_node=2", "time=2:00:00", "cpus_per_task=3", "partition=low"]
    assert main(["launch", "pretrain", tiny, "out=shown", *options, "setup=[module load x,date]"]) == 0
    shown = capsys.readouterr().out
    assert "dinoreg pretrain shown/launch/config.yaml resume=true" in shown
    asked = ("nodes=2", "ntasks-per-node=2", "gpus-per-node=2", "time=120", "signal=USR2@120", "requeue")
    for option in asked:
        assert f"    #SBATCH --{option}\n" in shown
    assert "--kill-on-bad-exit=1 --cpus-per-task=3" in shown
    assert "    module load x\n    date\n" in shown
    assert "wckey" not in shown
    for gpus, cores in (("2", True), ("0", False)):  # a process with one core would starve its GPU
        assert main(["launch", "pretrain", tiny, "out=shown", "dry_run=true", f"gpus_per_node={gpus}"]) == 0
        assert ("--cpus-per-task=4" in capsys.readouterr().out) is cores
    assert sorted(Path().iterdir()) == before


def test_a_dry_run_describes_a_job_where_there_is_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ["data=scenes", "out=shown", "nodes=2", "gpus_per_node=2", "partition=gpu", "dry_run=true"]
    assert main(["launch", "pretrain", "quickstart", "steps=77", *options]) == 0
    shown = capsys.readouterr().out
    assert {"    #SBATCH --nodes=2", "    #SBATCH --partition=gpu", "    steps=77"} <= set(shown.splitlines())
    assert "    seed=0" not in shown.splitlines()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_the_machines_do_not_share_is_guessed(cluster: SlurmCluster) -> None:
    pretrain(str(cluster.unshared / "run"))
    (job,) = ended(cluster.unshared / "run")
    assert job.state == "failed"
    assert "do the machines share the disk of" in job.text


def test_a_job_that_waits_is_cancelled_where_it_waits(cluster: SlurmCluster) -> None:
    pretrain("waiting", "slurm_args=[hold]")
    assert statuses("waiting")[0].text == f"held; scontrol release {job_of('waiting')} lets it go"
    launch("cancel", "waiting")
    (job,) = ended("waiting")
    assert job.state == "cancelled"


# ------------------------------------------------------------------------------------------------------------
# Trainings


def test_signals_at_any_moment_lose_nothing(done: Done, unbroken: list[tuple[float, ...]]) -> None:
    done(signalled)
    (job,) = ended("signalled")
    assert (job.state, job.text) == ("finished", "requeued twice")
    assert loss_trace(Path("signalled")) == unbroken
    first, second, third = events("signalled", "start")
    assert (first["step"], second["step"]) == (None, None)
    assert 5 <= third["step"] < STEPS


def test_two_tasks_on_two_nodes_train_together_and_a_signal_in_between_changes_nothing(done: Done) -> None:
    """Same topology, same losses: one job is left alone, one is asked to save in the middle and requeued."""
    done(pair)
    done(broken_pair)
    (whole,), (resumed,) = ended("pair"), ended("broken_pair")
    assert (whole.state, whole.text) == ("finished", "")
    assert (resumed.state, resumed.text) == ("finished", "requeued once")
    assert [len(line["nodes"]) for line in events("broken_pair", "start")] == [2, 2]
    assert "2 processes, ddp" in Path("pair/train.log").read_text()
    assert len(loss_trace(Path("pair"))) == STEPS
    assert loss_trace(Path("broken_pair")) == loss_trace(Path("pair"))


def test_a_preempted_training_goes_on_when_there_is_room_again(done: Done, unbroken: list[tuple[float, ...]]) -> None:
    done(preempted)
    (job,) = ended("preempted")
    assert (job.state, job.text) == ("finished", "requeued once")
    assert loss_trace(Path("preempted")) == unbroken
    assert events("preempted", "requeue")[0]["step"] >= 5  # it saved, and did not fall back on an older checkpoint


def test_a_training_whose_machine_is_lost_goes_on_elsewhere(done: Done) -> None:
    done(lost)
    done(pair)
    (job,) = ended("lost")
    assert (job.state, job.text) == ("finished", "requeued once")
    first, second = events("lost", "start")
    assert "n4" in first["nodes"]
    assert "n4" not in second["nodes"]
    assert second["step"] >= 5
    assert loss_trace(Path("lost")) == loss_trace(Path("pair"))


def test_cancelled_trainings_are_saved_and_do_not_come_back(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    done(cancelled)
    (at_once,), (saved,) = ended("at_once"), ended("saved")
    assert (at_once.state, saved.state) == ("cancelled", "stopped")
    for job in (at_once, saved):  # SIGTERM, too, leaves time to save (KillWait)
        assert job.text.startswith("as asked, saved at step ")
        assert len(events(job.record.run, "start")) == 1
    assert main(["launch", "status", "saved"]) == 0
    assert saved.line in capsys.readouterr().out.splitlines()
    assert main(["launch", "logs", "saved", "lines=10"]) == 0
    assert "stopped by SIGUSR2 after step" in capsys.readouterr().out
    more = f"steps={step_of('saved') + 2}"
    assert main(["launch", "pretrain", "saved", "resume=true", more, "wait=true"]) == 0
    assert statuses("saved")[-1].state == "finished"


def test_a_failure_ends_a_job_and_is_told(done: Done) -> None:
    done(doomed)
    (job,) = ended("doomed")
    assert job.state == "failed"
    assert job.text.startswith("data: doomed_data does not exist")
    assert len(events("doomed", "start")) == 1


# ------------------------------------------------------------------------------------------------------------
# Evaluations


def test_an_array_of_evaluations_ends_in_one_report(done: Done) -> None:
    """Arrays hold two tasks here, so three datasets take two of them; what fails is named in the report."""
    done(evaluated)
    jobs = read_records("evaluated")
    first, second = jobs[0].job.partition("_")[0], jobs[2].job
    assert [job.job for job in jobs[:3]] == [f"{first}_0", f"{first}_1", second]
    assert jobs[3].after == [job.job for job in jobs[:3]]
    assert [job.state for job in ended("evaluated")] == ["finished", "finished", "failed", "finished"]
    results = Path("evaluated/eval/0000007")
    assert {path.stem for path in results.glob("*.json")} == {"shapes", "colours"}
    assert "broken: failed" in (results / "report.html").read_text()
    assert not list(Path("evaluated/launch/weights").rglob("*.safetensors"))


def test_a_checkpoint_is_evaluated_by_jobs_of_their_own(done: Done) -> None:
    done(watched)
    assert [job.state for job in ended("watched")] == ["finished"] * 3
    assert [path.name for path in Path("watched/eval/0000006").glob("*.json")] == ["beside.json"]
    assert Path("watched/eval/0000006/report.html").is_file()
    assert not list(Path("watched/launch/weights").rglob("*.safetensors"))


def test_a_training_outlives_its_time_limit(done: Done, unbroken: list[tuple[float, ...]]) -> None:
    done(limited)
    (job,) = ended("limited")
    assert job.state == "finished"
    assert job.text.startswith("requeued")
    assert loss_trace(Path("limited")) == unbroken
