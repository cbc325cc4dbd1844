"""Launches without a cluster: what is asked for, what is refused, what jobs do with signals, jobs on this machine."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from jobs_on_trial import EVALUATION, ended, events, labelled_folder, statuses, tiny_file, trains, until
from processes import on_processes, pretrain_each
from small_runs import tiny_model, write_run
from training import loss_trace, tiny_config

from dinoreg.checkpoint.steps import watched_in
from dinoreg.commands.arguments import Verb
from dinoreg.commands.help import verb_help
from dinoreg.commands.launch import check_command
from dinoreg.commands.main import main
from dinoreg.commands.options import ACTIONS, EmbedOptions, ExportOptions, NoOptions, ReportOptions
from dinoreg.commands.registry import VERBS, run_verb
from dinoreg.config.load import Config, load_config
from dinoreg.config.option import keys_of
from dinoreg.evaluation.options import EvalOptions
from dinoreg.jobs import slurm
from dinoreg.jobs.attempt import Attempt, Command
from dinoreg.jobs.job_type import Plan, Request, find_job, job_files
from dinoreg.jobs.local_queue import LocalJob, read_state
from dinoreg.jobs.options import OPTION_NAMES, LaunchOptions, read_time, split_options
from dinoreg.jobs.records import Record, add_event, add_records, cancel_file, read_records
from dinoreg.jobs.snapshot import copy_package
from dinoreg.jobs.status import describe as status_lines
from dinoreg.jobs.status import examine
from dinoreg.runtime.environment import is_alive, start_time
from dinoreg.runtime.errors import Interrupted, RunError, UserError

ROOT = Path(__file__).resolve().parent.parent
LOCAL = "cluster=local"
FONTS = matplotlib.get_cachedir()  # the list of fonts takes seconds to make


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, jobs that find the package, and no scheduler that may be around."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLCONFIGDIR", FONTS)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SUBMITIT_")):
            monkeypatch.delenv(name)


def plan_of(job: str, *arguments: str) -> Plan:
    plain = [each for each in arguments if "=" not in each]
    options, rest, given = split_options([each for each in arguments if "=" in each])
    request = Request(plain[0] if plain else "", tuple(rest), options, given, check_command)
    return find_job(job).plan(request)


# ------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:30", 91),
        ("8:00:00", 480),
        ("0:00:30", 1),
        ("2-00:00:00", 2880),
        ("2-0", 2880),
        ("1-12", 2160),
        ("1-01:30", 1530),
        ("1-00:00:01", 1441),
    ],
)
def test_durations_are_read_as_slurm_reads_them(text: str, minutes: int) -> None:
    assert read_time(text) == minutes


@pytest.mark.parametrize("text", ["soon", "8h", "1:2:3:4", "-5", "", "0", "0:00:00", "1.5"])
def test_a_duration_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected minutes, hours:minutes:seconds or days-hours"):
        read_time(text)


def test_processes_follow_the_gpus_unless_said_otherwise() -> None:
    assert LaunchOptions().world_size == 1
    assert LaunchOptions(gpus_per_node=8, nodes=2).world_size == 16
    assert LaunchOptions(gpus_per_node=8, tasks_per_node=1, nodes=2).world_size == 2
    assert LaunchOptions(gpus_per_node=0).world_size == 1


def test_the_signal_comes_two_minutes_before_the_limit_or_at_half_of_a_short_one() -> None:
    assert LaunchOptions().signal_seconds == 120
    assert LaunchOptions(time="60").signal_seconds == 120
    assert LaunchOptions(time="2").signal_seconds == 60
    assert LaunchOptions(time="60", signal_delay=300).signal_seconds == 300


def test_the_jobs_keys_are_no_keys_of_what_they_run() -> None:
    classes = (Config, EvalOptions, EmbedOptions, ExportOptions, ReportOptions)
    assert not set(OPTION_NAMES) & {key.partition(".")[0] for cls in classes for key in keys_of(cls)}


def test_help_lists_every_key_and_every_kind_of_job() -> None:
    text = verb_help(VERBS["launch"])
    for word in (*OPTION_NAMES, *ACTIONS, *job_files()):
        assert word in text


# ------------------------------------------------------------------------------------------------------------
# What is refused: one line, exit code 2, nothing written

PRETRAIN = ["launch", "pretrain", "quickstart", "data=scenes", "out=run"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launch"], "launch: missing JOB; expected evaluate, export, pretrain, sweep, status, logs, cancel"),
        (["launch", "pretain", "quickstart"], "launch: pretain: unknown job; did you mean pretrain?"),
        (["launch", "statsu", "run"], "launch: statsu: unknown job; did you mean status?"),
        (["launch", "own.py"], "launch: own.py: no such file"),
        (["launch", "pretrain", LOCAL], "launch pretrain: missing CONFIG"),
        (["launch", "pretrain", "quickstart", "again", LOCAL], "launch pretrain: again: expected key=value; usage:"),
        (["launch", "pretrain", "quickstar", "out=run", LOCAL], "config quickstar: unknown; did you mean quickstart?"),
        (["launch", "pretrain", "quickstart", "data=scenes", LOCAL], "out: missing"),
        ([*PRETRAIN, LOCAL, "stepz=5"], "stepz: unknown key (command line); did you mean steps?"),
        ([*PRETRAIN, LOCAL, "partiton=low"], "partiton: unknown key; did you mean partition?"),
        ([*PRETRAIN, LOCAL, "gpu_per_node=1"], "gpu_per_node: unknown key; did you mean gpus_per_node?"),
        ([*PRETRAIN, LOCAL, "time=8h"], "time=8h: expected minutes, hours:minutes:seconds or days-hours"),
        ([*PRETRAIN, LOCAL, "nodes=0"], "nodes=0: expected a number in"),
        ([*PRETRAIN, LOCAL, "nodes=two"], "nodes=two: expected a whole number"),
        ([*PRETRAIN, LOCAL, "nodes=2"], "nodes=2: cluster=local is this machine alone"),
        ([*PRETRAIN, LOCAL, "gpus_per_node=64"], "gpus_per_node=64: this machine has"),
        ([*PRETRAIN, LOCAL, "mem=lots"], "mem=lots: expected a number with its unit, as 64G"),
        ([*PRETRAIN, LOCAL, "time=1", "signal_delay=60"], "signal_delay=60: expected less than time=1, which is 60 s"),
        ([*PRETRAIN, LOCAL, "code=mine"], "code=mine: expected copy or shared"),
        ([*PRETRAIN, LOCAL, "container=image.sif"], "container: jobs of cluster=local run in this environment"),
        *(
            ([*PRETRAIN, f"{key}=a\ntouch b\n#"], f"{key}=a touch b #: expected no control characters")
            for key in ("account", "qos", "constraint", "exclude", "reservation", "python", "container", "name")
        ),
        ([*PRETRAIN, LOCAL, "slurm_args=[Mail=x y]"], "slurm_args=Mail=x y: expected KEY=VALUE"),
        ([*PRETRAIN, "cluster=sge"], "cluster=sge: expected slurm or local"),
        ([*PRETRAIN, "cluster=slurm"], "cluster=slurm: there is no sbatch on the PATH"),
        ([*PRETRAIN, LOCAL, "data=nowhere"], "data: given twice"),
        (
            ["launch", "pretrain", "quickstart", "data=nowhere", "out=run", LOCAL],
            "data: nowhere does not exist, expected a folder",
        ),
        (
            ["launch", "pretrain", "quickstart", "data=scenes", "out=full", LOCAL],
            "out=full: not empty; use resume=true",
        ),
        (
            ["launch", "pretrain", "quickstart", "data=scenes", "out=full", "resume=true", LOCAL],
            "out=full: holds no run to resume",
        ),
        (
            ["launch", "pretrain", "quickstart", "data=scenes", "out=full", "overwrite=true", LOCAL],
            "out=full: holds something other than a run (no config.yaml); it is not overwritten",
        ),
        (["launch", "pretrain", "quickstart", "data=scenes", "out=note.txt", LOCAL], "out=note.txt: is a file"),
        ([*PRETRAIN, LOCAL, "evaluate.root=x"], "evaluate.root=x: expected evaluate=NAMES beside it"),
        ([*PRETRAIN, LOCAL, "evaluate=pets", "evaluate.rot=x"], "rot: unknown key"),
        ([*PRETRAIN, LOCAL, "evaluate=pets", "evaluate.out=x"], "evaluate.out=x: each checkpoint's teacher"),
        (["launch", "evaluate", "pets", "root=full", LOCAL], "launch evaluate: weights= is missing"),
        (["launch", "evaluate", "weights=random:vitt16_reg4", LOCAL], "launch evaluate: missing NAMES"),
        (
            ["launch", "evaluate", "petz", "weights=random:vitt16_reg4", "root=full", LOCAL],
            "petz: unknown dataset; did you mean",
        ),
        (["launch", "evaluate", "pets", "weights=random:vitt16_reg4", LOCAL], "pets: root= is missing"),
        (["launch", "evaluate", "pets", "weights=random:vitt16_reg4", "root=full", LOCAL], "pets: full/"),
        (
            ["launch", "evaluate", "all", "weights=random:vitt16_reg4", "root=full", LOCAL],
            "evaluate all: none of the datasets",
        ),
        (["launch", "sweep", "quickstart", "data=scenes", "out=run", LOCAL], "launch sweep: nothing varies"),
        (["launch", "sweep", "quickstart", "data=scenes", "sweep.seed=[0,1]", LOCAL], "out: missing"),
        ([*PRETRAIN[:1], "sweep", *PRETRAIN[2:], "sweep.seed=0", LOCAL], "sweep.seed=0: expected a list of values"),
        ([*PRETRAIN[:1], "sweep", *PRETRAIN[2:], "sweep.seed=[]", LOCAL], "sweep.seed=[]: expected values that differ"),
        ([*PRETRAIN[:1], "sweep", *PRETRAIN[2:], "sweep.seed=[1,1]", LOCAL], "sweep.seed=[1,1]: expected values that"),
        ([*PRETRAIN[:1], "sweep", *PRETRAIN[2:], "sweep.sead=[0,1]", LOCAL], "sead: unknown key"),
        ([*PRETRAIN[:1], "sweep", *PRETRAIN[2:], "seed=1", "sweep.seed=[0,1]", LOCAL], "seed: given twice"),
        (["launch", "export", "format=timm", "out=x", LOCAL], "weights= is missing"),
        (["launch", "export", "wieghts=x", LOCAL], "wieghts: unknown key (command line); did you mean weights?"),
        (["launch", "status"], "launch status: missing RUN"),
        (["launch", "status", "full"], "full: nothing was launched for this folder"),
        (["launch", "logs", "full", "tail=3"], "tail: unknown key (command line)"),
        (["launch", "cancel", "full", "save=maybe"], "save=maybe: expected true or false"),
    ],
    ids=lambda value: " ".join(value[1:])[:60] if isinstance(value, list) else "",
)
def test_what_cannot_be_launched_is_one_line_and_nothing_is_written(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("full").mkdir()
    Path("full/diary.txt").write_text("mine")
    Path("note.txt").write_text("no folder")
    before = sorted(Path().rglob("*"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.removeprefix("dinoreg: ").startswith(expected)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [("JOB = 3\n", "has no JOB"), ("", "has no JOB"), ("import nothing_of_the_kind\n", "cannot be loaded")],
)
def test_a_job_file_that_declares_none_is_refused(
    content: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(content)
    assert main(["launch", "mine.py"]) == 2
    assert expected in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Declarations: from a request to command lines


@pytest.mark.parametrize("name", sorted(job_files()))
def test_every_shipped_job_declares_itself(name: str) -> None:
    job = find_job(name)
    assert job.name == name
    assert job.usage.startswith(name)
    assert job.summary


def test_a_training_is_the_same_command_at_every_start_and_keeps_its_config() -> None:
    plan = plan_of("pretrain", "quickstart", "data=scenes", "out=run", "optim.lr=1e-3", "nodes=2")
    (group,) = plan.groups
    assert group.commands == (("pretrain", "run/launch/config.yaml", "resume=true"),)
    assert group.runs == (Path("run"),)
    Path("run/launch").mkdir(parents=True)
    ((path, text),) = plan.files.items()
    path.write_text(text)
    written = load_config(path)
    assert written == load_config("quickstart", ["data=scenes", "out=run", "optim.lr=1e-3"])


def test_evaluations_beside_a_training_ask_for_what_it_asked_for_but_for_its_size() -> None:
    given = ["partition=gpu", "nodes=4", "gpus_per_node=8", "time=2-0", "account=us", "setup=[module load a,date]"]
    own = [
        "evaluate=pets,cifar10",
        "evaluate.root=/data",
        "evaluate.knn.k=[5]",
        "evaluate.time=60",
        "evaluate.account=me",
    ]
    (group,) = plan_of("pretrain", "quickstart", "data=scenes", "out=run", *given, *own).groups
    name, datasets, *rest = group.evaluate
    assert (name, datasets) == ("evaluate", "pets,cifar10")
    assert set(rest) == {
        *("root=/data", "knn.k=[5]", "time=60", "account=me"),
        *("partition=gpu", "gpus_per_node=1", "setup=[module load a,date]"),
    }
    options, keys, _ = split_options(rest)
    assert options.setup_lines == ["module load a", "date"]
    assert (options.world_size, options.minutes, keys) == (1, 60, ["root=/data", "knn.k=[5]"])


def test_each_dataset_is_a_task_of_its_own_and_the_report_comes_last() -> None:
    for name in ("shapes", "colours"):
        labelled_folder(Path(name))
    run = write_run(Path("run"), tiny_model())
    plan = plan_of("evaluate", "shapes,colours", f"weights={run}", "knn.k=[3]", "time=300", "gpus_per_node=0")
    evaluate, report = plan.groups
    kept = "run/launch/weights/run/teacher/step_0000007.safetensors"
    for name, command in zip(("shapes", "colours"), evaluate.commands):
        assert command == ("eval", name, f"weights={kept}", "out=run", "knn.k=[3]", "report=false")
    assert report.commands == (("report", "run/eval/0000007"),)
    assert report.after == ("evaluate",)
    assert report.options["time"] == "60"
    assert plan.folder == Path("run")
    assert plan.links[Path(kept)] == Path("run/teacher/step_0000007.safetensors")
    assert set(report.removes) == set(plan.links)


def test_jobs_know_by_which_images_the_step_was_chosen() -> None:
    labelled_folder(Path("shapes"))
    run = write_run(Path("run"), tiny_model())
    (run / "checkpoints").mkdir()
    (run / "checkpoints/best").write_text("step_0000007\n")
    (run / "probe.json").write_text('{"data": "shapes", "metric": "knn_top1", "images": ["00"]}')
    plan = plan_of("evaluate", "shapes", f"weights={run}/best", "gpus_per_node=0")
    for path, text in plan.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    watched = watched_in(Path("run/launch/weights/run"), 7)
    assert watched is not None
    assert (watched.data, watched.chosen) == ("shapes", True)


def test_a_datasets_own_options_go_to_its_task_alone() -> None:
    from miniatures import aircraft, pets

    for miniature in (aircraft, pets):
        miniature.write(Path("data"))
    words = ["weights=random:vitt16_reg4", "root=data", "aircraft.crop_banner=false"]
    plan = plan_of("evaluate", "aircraft,pets", *words)
    with_banner, without = plan.groups[0].commands
    assert "aircraft.crop_banner=false" in with_banner
    assert not any("aircraft" in word for word in without)
    assert plan.folder == Path("runs/eval/random-vitt16_reg4")
    everything = plan_of("evaluate", "all", *words)
    assert [command[1] for command in everything.groups[0].commands] == ["aircraft", "pets"]
    assert any(note.startswith("not evaluated: ") for note in everything.notes)


def test_a_sweep_trains_every_combination_in_a_folder_of_its_name() -> None:
    grid = ["sweep.optim.lr=[1e-3,2e-3]", "sweep.crops.global_scale=[[0.2,1],[0.3,1]]"]
    plan = plan_of("sweep", "quickstart", "data=scenes", "out=runs/s", "seed=4", *grid)
    sweep, report = plan.groups
    names = [
        *("optim.lr=1e-3,crops.global_scale=-0.2,1-", "optim.lr=1e-3,crops.global_scale=-0.3,1-"),
        *("optim.lr=2e-3,crops.global_scale=-0.2,1-", "optim.lr=2e-3,crops.global_scale=-0.3,1-"),
    ]
    assert [path.name for path in sweep.runs] == names
    last = load_config_text(plan.files[Path("runs/s") / names[-1] / "launch" / "config.yaml"])
    assert (last.optim.lr, last.crops.global_scale, last.seed) == (2e-3, (0.3, 1.0), 4)
    assert last.out == f"runs/s/{names[-1]}"
    assert report.commands == (("report", "runs/s", "out=runs/s/compare.html"),)
    assert report.after == ("sweep",)
    assert "4 trainings: 2 of optim.lr x 2 of crops.global_scale" in plan.notes


def test_trainings_of_one_folder_are_refused() -> None:
    with pytest.raises(UserError, match="two of the trainings have this folder"):
        plan_of("sweep", "quickstart", "data=scenes", "out=runs/s", "sweep.crops.global_scale=[[0.3,1],[ 0.3,1]]")


def load_config_text(text: str) -> Config:
    Path("loaded.yaml").write_text(text)
    return load_config("loaded.yaml")


def test_an_export_keeps_its_records_with_the_run_it_comes_from() -> None:
    run = write_run(Path("run"), tiny_model())
    plan = plan_of("export", f"weights={run}", "format=safetensors", "out=x")
    assert plan.folder == run
    assert plan.groups[0].commands == (("export", "weights=run", "format=safetensors", "out=x"),)
    assert plan_of("export", "weights=random:vitt16_reg4", "format=timm", "out=a/x").folder == Path("runs/export/x")


# ------------------------------------------------------------------------------------------------------------
# The copy of the code


def test_a_job_runs_its_copy_of_the_package_wherever_it_works() -> None:
    copy = copy_package(Path("run/launch/code"))
    assert copy_package(Path("run/launch/code")) == copy
    assert sorted(path.name for path in (copy / "dinoreg" / "_bundled").iterdir()) == ["configs", "eval", "launch"]
    # A working folder with another package of the name, as a checkout that has moved on.
    Path("dinoreg").mkdir()
    Path("dinoreg/__init__.py").write_text("raise SystemExit('the wrong package')\n")
    start = copy / "dinoreg" / "jobs" / "entry.py"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(start), "-u", "-m", "dinoreg", "launch", "pretrain", "--help"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout
    module = "import sys, dinoreg.jobs.attempt; print(dinoreg.jobs.attempt.__file__)"
    Path("which.py").write_text(module)
    (copy / "which.py").write_text(module)
    done = subprocess.run([sys.executable, str(start), "-m", "which"], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(copy.absolute() / "dinoreg" / "jobs" / "attempt.py")


def test_another_code_is_another_copy_and_the_first_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    first = copy_package(Path("code"))
    from dinoreg.jobs import snapshot

    Path("extra").mkdir()
    Path("extra/extra.py").write_text("x = 1\n")
    monkeypatch.setitem(snapshot.FOLDERS, "dinoreg/extra", Path("extra"))
    second = copy_package(Path("code"))
    assert second != first
    assert first.is_dir()
    assert (second / "dinoreg/extra/extra.py").read_text() == "x = 1\n"


def test_signals_are_held_back_until_a_job_takes_them(tmp_path: Path) -> None:
    """The first lines of a job: a request to save that comes during the imports waits."""
    copy = copy_package(tmp_path / "code")
    (copy / "slow.py").write_text(
        "import signal, time\n"
        "print('up', flush=True)\n"
        "time.sleep(0.5)\n"
        "signal.signal(signal.SIGUSR2, lambda *_: print('taken', flush=True))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})\n"
    )
    words = shlex.split(slurm.interpreter(LaunchOptions(), tmp_path, copy))
    process = subprocess.Popen([*words, "-u", "-m", "slow"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.read() == "taken\n"
    assert process.wait() == 0


def test_containers_are_started_with_the_folders_that_the_job_needs(tmp_path: Path) -> None:
    options = LaunchOptions(container="torch.sif", gpus_per_node=2, container_mounts=["/data:/data"])
    words = shlex.split(slurm.interpreter(options, tmp_path, tmp_path / "code"))
    assert words[:4] == ["apptainer", "exec", "--nv", "--bind"]
    assert words[4].split(",") == [f"{path}:{path}" for path in (Path.cwd(), tmp_path, tmp_path / "code")] + [
        "/data:/data"
    ]
    assert words[5:] == ["torch.sif", "python3", str(tmp_path / "code" / "dinoreg" / "jobs" / "entry.py")]


# ------------------------------------------------------------------------------------------------------------
# Inside a job


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The surroundings of a local job's process; returns the launch folder."""
    launch = tmp_path / "here" / "run" / "launch"
    launch.mkdir(parents=True)
    for name, value in {
        "EXECUTOR": "local",
        "FOLDER": str(launch),
        "LOCAL_JOB_ID": "local1.0",
        "LOCAL_NTASKS": "1",
        "LOCAL_GLOBALID": "0",
    }.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    return launch


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, in_job: Path) -> dict[str, Any]:
    """A job whose training is a stand-in: `act` is what it does. The handlers of this process come back afterwards."""
    stage: dict[str, Any] = {"requeued": 0, "act": lambda hooks: None}

    def train(arguments: list[str], **hooks: Any) -> None:
        stage["arguments"], stage["place"] = arguments, dict(os.environ)
        stage["act"](hooks)

    def submitits(number: int, frame: Any) -> None:
        stage["command"].checkpoint()
        stage["requeued"] += 1
        raise SystemExit(144)

    monkeypatch.setitem(VERBS, "pretrain", Verb("pretrain", NoOptions, train, read=lambda arguments: (arguments,)))
    previous = signal.signal(signal.SIGUSR2, submitits)
    stage["command"] = Command(run_verb, ("pretrain", "x", "resume=true"), str(in_job), run=str(in_job.parent))
    yield stage
    signal.signal(signal.SIGUSR2, previous)


def interrupted(number: int) -> Any:
    def act(hooks: Any) -> None:
        raise Interrupted("stopped after step 3", number)

    return act


def save_at(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "last").write_text(f"step_{step:07d}\n")


def test_a_command_runs_in_the_process_of_its_job_under_torchruns_names(quiet: dict[str, Any], in_job: Path) -> None:
    assert quiet["command"]() == "done"
    assert quiet["arguments"] == ["x", "resume=true"]
    place = quiet["place"]
    assert [place[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["0", "1", "0", "1"]
    assert [line["event"] for line in events(in_job.parent, "start") + events(in_job.parent, "end")] == ["start", "end"]


def test_under_slurm_every_process_knows_where_rank_0_listens(
    quiet: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "4",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[07-08]",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert quiet["command"]() == "done"
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [quiet["place"][name] for name in names] == ["3", "4", "1", "2", "node07", "16711"]


def test_a_training_that_was_asked_to_save_is_requeued(quiet: dict[str, Any], in_job: Path) -> None:
    save_at(in_job.parent, 3)
    quiet["act"] = interrupted(signal.SIGUSR2)
    with pytest.raises(SystemExit):
        quiet["command"]()
    assert quiet["requeued"] == 1
    (event,) = events(in_job.parent, "requeue")
    assert event["step"] == 3


def test_a_request_to_save_outside_the_training_loop_requeues_at_once(quiet: dict[str, Any]) -> None:
    quiet["act"] = lambda hooks: os.kill(os.getpid(), signal.SIGUSR2)
    with pytest.raises(SystemExit):
        quiet["command"]()
    assert quiet["requeued"] == 1


def test_a_request_that_comes_after_the_end_is_too_late(quiet: dict[str, Any]) -> None:
    assert quiet["command"]() == "done"
    os.kill(os.getpid(), signal.SIGUSR2)
    assert quiet["requeued"] == 0


def test_a_job_that_was_cancelled_is_not_requeued(quiet: dict[str, Any], in_job: Path) -> None:
    save_at(in_job.parent, 3)

    def act(hooks: Any) -> None:
        cancel_file(in_job, "local1.0").write_text("save\n")
        raise Interrupted("stopped after step 3", signal.SIGUSR2)

    quiet["act"] = act
    assert quiet["command"]() == "stopped"
    assert quiet["requeued"] == 0
    assert events(in_job.parent, "stopped")[0]["why"] == "as asked, saved at step 3"


def test_sigterm_ends_a_job_of_this_machine(quiet: dict[str, Any], in_job: Path) -> None:
    quiet["act"] = interrupted(signal.SIGTERM)
    assert quiet["command"]() == "stopped"
    assert events(in_job.parent, "stopped")[0]["why"] == "by SIGTERM, nothing was saved"


@pytest.mark.parametrize(("state", "again"), [("RUNNING", True), ("CANCELLED", False), ("COMPLETING", False)])
def test_under_slurm_sigterm_requeues_a_preempted_job_and_not_a_cancelled_one(
    state: str, again: bool, quiet: dict[str, Any], in_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt(quiet["command"])
    attempt.on_slurm = True
    asked: list[str] = []
    monkeypatch.setattr(slurm, "own_state", lambda job: asked.append(job) or state)
    assert attempt._is_requeued_after(signal.SIGTERM) is again
    assert asked == ["local1.0"]


def test_restarts_have_a_cap(quiet: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet["command"] = Command(
        run_verb, quiet["command"].arguments, quiet["command"].launch, quiet["command"].run, requeues=2
    )
    quiet["act"] = interrupted(signal.SIGUSR2)
    monkeypatch.setenv("DINOREG_RESTARTS", "2")
    with pytest.raises(RunError, match=r"restarted 2 times, as requeues=2 allows; go on with: dinoreg launch pretrain"):
        quiet["command"]()
    monkeypatch.setenv("DINOREG_RESTARTS", "3")  # Slurm itself requeued it, after a lost machine
    with pytest.raises(RunError, match=r"restarted more than 2 times \(requeues=\)"):
        quiet["command"]()
    assert quiet["requeued"] == 0


def test_a_training_that_gets_nowhere_stops_after_three_restarts(
    quiet: dict[str, Any], in_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for restarts, step in enumerate([3, 5, 5, 5]):
        save_at(in_job.parent, step)
        monkeypatch.setenv("DINOREG_RESTARTS", str(restarts))
        assert quiet["command"]() == "done"
    monkeypatch.setenv("DINOREG_RESTARTS", "4")
    with pytest.raises(RunError, match="restarted 3 times without a new checkpoint, still at step 5: save more often"):
        quiet["command"]()
    assert "restarted 3 times" in events(in_job.parent, "failed")[0]["error"]


def test_a_restart_removes_what_an_earlier_start_left(
    quiet: dict[str, Any], in_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = [in_job / name for name in ("local1.0_0_result.pkl", "local1.0_0_result.pkl.save_tmp")]
    stale.append(in_job / "local1.0_submitted.pkl.save_tmp")  # submitit refuses to write beside it
    for path in stale:
        path.write_text("old")
    monkeypatch.setenv("DINOREG_RESTARTS", "1")
    quiet["command"]()
    assert not any(path.exists() for path in stale)


def test_a_failure_is_noted_in_one_line_and_raised(
    quiet: dict[str, Any], in_job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(hooks: Any) -> None:
        raise RunError("the disk\n  is full")

    quiet["act"] = act
    with pytest.raises(RunError):
        quiet["command"]()
    assert events(in_job.parent, "failed")[0]["error"] == "the disk is full"
    assert capsys.readouterr().err == "dinoreg: the disk is full\n"
    assert quiet["requeued"] == 0


def test_a_requeue_that_slurm_was_quicker_with_is_no_failure(
    quiet: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(number: int, frame: Any) -> None:
        raise subprocess.CalledProcessError(1, ["scontrol", "requeue"])

    signal.signal(signal.SIGUSR2, refused)
    quiet["act"] = interrupted(signal.SIGUSR2)
    monkeypatch.setattr(slurm, "own_state", lambda job: "PENDING")
    with pytest.raises(SystemExit):
        quiet["command"]()
    monkeypatch.setattr(slurm, "own_state", lambda job: "RUNNING")
    with pytest.raises(RunError, match="could not be requeued"):
        quiet["command"]()


def test_in_a_container_the_batch_script_is_asked_to_requeue(
    quiet: dict[str, Any], in_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt(quiet["command"])
    attempt.on_slurm = True
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit):
        attempt._requeue()
    assert (in_job / "local1.0_requeue").is_file()
    made = slurm._requeue_from_outside(in_job)
    script = in_job / "batch.sh"
    tools = in_job / "tools"
    tools.mkdir()
    for name, text in {"squeue": "echo RUNNING", "scontrol": f'echo "$@" > {in_job}/asked'}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    script.write_text("\n".join(["(exit 3)", *made]))
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "local1.0"}
    assert subprocess.run(["bash", str(script)], env=environment).returncode == 3
    assert (in_job / "asked").read_text() == "requeue local1.0\n"
    assert not (in_job / "local1.0_requeue").exists()


def test_a_checkpoint_sends_its_evaluation_off_and_never_fails(
    quiet: dict[str, Any], in_job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command(
        run_verb, *(("pretrain", "x"), str(in_job), str(in_job.parent)), evaluate=("status-of-nothing", "a b")
    )
    attempt = Attempt(command)
    begun = time.monotonic()
    attempt.evaluate(5, Path("teacher/step_0000005.safetensors"))
    assert time.monotonic() - begun < 1
    attempt.finish_submissions(60)
    said = (in_job / "local1.0_evaluate.log").read_text()
    assert "launch: status-of-nothing: unknown job" in said
    broken = Attempt(Command(run_verb, ("pretrain",), "/nowhere/launch", "run", ("evaluate", "pets")))
    broken.evaluate(5, Path("teacher"))
    assert "step 5 is not evaluated" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Status in words


def record(job: str = "12", **changed: Any) -> Record:
    values: dict[str, Any] = {
        "job": job,
        "launch": 1,
        "group": "pretrain",
        "cluster": "slurm",
        "command": ["pretrain", "run/launch/config.yaml", "resume=true"],
        "nodes": 1,
        "tasks": 1,
        "run": "run",
        "after": [],
        "runner": [],
        "time": 0.0,
    }
    return Record(**{**values, **changed})


def words(monkeypatch: pytest.MonkeyPatch, state: slurm.JobState | None, *records: Record) -> list[str]:
    launch = Path("run/launch")
    launch.mkdir(parents=True, exist_ok=True)
    if not (launch / "jobs.jsonl").exists():
        add_records(launch, records or [record()])
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(slurm, "states", lambda jobs: {} if state is None else dict.fromkeys(jobs, state))
    return [line.rpartition("  ")[2] for line in status_lines("run")]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (slurm.JobState("PENDING", "Resources"), "pretrain: pending, waits for free machines"),
        (slurm.JobState("PENDING", "Priority"), "pretrain: pending, others come first"),
        (
            slurm.JobState("PENDING", "BeginTime", begins="2026-01-02T03:04:05"),
            "pretrain: pending, was requeued, may start at 2026-01-02 03:04:05",
        ),
        (slurm.JobState("PENDING", "QOSMaxGRESPerUser"), "pretrain: pending, QOSMaxGRESPerUser"),
        (
            slurm.JobState("PENDING", "(ReqNodeNotAvail, Reserved)"),
            "pretrain: pending, the machines it needs are down or",
        ),
        (slurm.JobState("RUNNING", "", "n[1-2]", "3:20"), "pretrain: running, on n[1-2] for 3:20, not training yet"),
        (slurm.JobState("COMPLETING", "", "n1", "3:20"), "pretrain: running, completing, on n1 for 3:20"),
        (slurm.JobState("COMPLETED"), "pretrain: finished"),
        (slurm.JobState("CANCELLED"), "pretrain: cancelled"),
        (
            slurm.JobState("TIMEOUT"),
            "pretrain: failed, killed at its time limit, it ended before it wrote a line; do the",
        ),
        (slurm.JobState("OUT_OF_MEMORY"), "pretrain: failed, killed for want of memory (mem=)"),
        (None, "pretrain: lost, the scheduler knows it no more, and it wrote no ending"),
    ],
)
def test_states_are_told_in_words(state: slurm.JobState | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = words(monkeypatch, state)
    assert line.startswith(expected)


def test_the_status_says_which_steps_are_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words(monkeypatch, slurm.JobState("COMPLETED"))
    assert main(["launch", "status", "run"]) == 0
    assert "weights=" not in capsys.readouterr().out
    Path("run/checkpoints").mkdir()
    Path("run/checkpoints/last").write_text("step_0000200\n")
    assert main(["launch", "status", "run"]) == 0
    assert "weights=run means step 200 (last)" in capsys.readouterr().out


def test_the_words_of_a_running_training_say_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Path("run/launch")
    launch.mkdir(parents=True)
    (launch.parent / "status.json").write_text('{"phase": "running", "step": 1000, "num_steps": 5000}\n')
    metrics = {"step": 1200, "images_per_second": 35.21, "step_time": 0.98}
    (launch.parent / "metrics.jsonl").write_text(json.dumps(metrics) + '\n{"step": 12')
    header = (
        "I vits14_reg4: 22.06 M parameters, cuda:0 bfloat16, attention {}, 9 images, 5,000 steps of 64 (9 passes)\n"
    )
    (launch.parent / "train.log").write_text(header.format("xformers") + header.format("varlen (no xformers)"))
    for restarts in (0, 1, 2):
        add_event(launch, "12", 0, "start", restarts=restarts, step=None)
    (line,) = words(monkeypatch, slurm.JobState("RUNNING", "", "n1", "3:20"))
    done = "step 1200 of 5000, 35.2 images/s, 1:02:04 left"
    assert line == f"pretrain: running, on n1 for 3:20, {done}, attention varlen, requeued twice"


def test_the_words_of_a_failed_job_are_its_own_or_the_last_of_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Path("run/launch")
    launch.mkdir(parents=True)
    (launch / "12_0_log.err").write_text("step 1\nImportError: no torch\nsrun: error: n1: task 0: Exited\n")
    failed = slurm.JobState("FAILED")
    two = record(tasks=2)
    assert words(monkeypatch, failed, two) == ["pretrain: failed, ImportError: no torch (run/launch/12_0_log.err)"]
    add_event(launch, "12", 0, "start", restarts=0)
    add_event(launch, "12", 0, "failed", error="rank 1: the disk is full", reported=True)
    add_event(launch, "12", 1, "failed", error="the disk is full", reported=False)
    assert words(monkeypatch, failed) == ["pretrain: failed, rank 1: the disk is full"]


def test_a_job_that_slurm_forgot_is_what_it_wrote_last(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Path("run/launch")
    launch.mkdir(parents=True)
    add_event(launch, "12", 0, "start", restarts=0)
    add_event(launch, "12", 0, "end")
    assert words(monkeypatch, None) == ["pretrain: finished"]


def test_earlier_launches_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record("1"), record("2", launch=2), record("3", launch=2), record("4", launch=3)]
    Path("run/launch").mkdir(parents=True)
    add_records(Path("run/launch"), records)
    with open("run/launch/jobs.jsonl", "a") as file:
        file.write('{"job": "torn')
    assert words(monkeypatch, slurm.JobState("COMPLETED"))[-1] == "pretrain: finished"
    assert [each.record.job for each in examine("run")] == ["1", "2", "3", "4"]
    _, second, last = status_lines("run")
    assert second.startswith("launch 2 (pretrain, ")
    assert second.endswith("): 2 finished")
    assert last == "4  pretrain: finished"


def test_slurms_answer_is_read_whatever_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*command: str) -> subprocess.CompletedProcess[str]:
        if command[0] == "sacct":
            return subprocess.CompletedProcess(command, 0, "7|CANCELLED by 0|None|n3|1-02:03:04\n8|odd\n", "")
        table = "5_1|RUNNING|None|n[1-2]|3:20|2026-01-01T00:00:00\n6|PENDING|Resources||0:00|N/A\n\nodd line\n"
        return subprocess.CompletedProcess(command, 0, table, "")

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr("shutil.which", lambda name: name)
    known = slurm.states(["5_1", "6", "7", "8"])
    assert known["5_1"] == slurm.JobState("RUNNING", "", "n[1-2]", "3:20", "2026-01-01T00:00:00")
    assert known["6"].reason == "Resources"
    assert (known["7"].state, known["7"].elapsed) == ("CANCELLED", "1-02:03:04")
    assert "8" not in known


# ------------------------------------------------------------------------------------------------------------
# The runner of this machine, with scripts in place of trainings

SCRIPT = """\
echo "$SUBMITIT_LOCAL_JOB_ID $SUBMITIT_LOCAL_LOCALID start" >> trace
case $SUBMITIT_LOCAL_JOB_ID in
  again) if [ "$DINOREG_RESTARTS" = 2 ]; then exit 0; else exit 144; fi ;;
  bad) exit 5 ;;
  half) if [ $SUBMITIT_LOCAL_LOCALID = 1 ]; then exit 5; else sleep 60; fi ;;
  long) trap 'echo "asked" >> trace; exit 144' USR2; sleep 60 & wait ;;
  polite) trap 'echo "saved" >> trace; exit 0' USR2; sleep 60 & wait ;;
  *) sleep 0.3 ;;
esac
echo "$SUBMITIT_LOCAL_JOB_ID $SUBMITIT_LOCAL_LOCALID end" >> trace
"""


def local_job(job: str, **changed: Any) -> LocalJob:
    values: dict[str, Any] = {"after": [], "tasks": 1, "gpus": 0, "seconds": 0, "signal_seconds": 0, "setup": []}
    return LocalJob(job, python="sh script.sh", trains=False, **{**values, **changed})


def run_plan(*jobs: LocalJob, places: int = 1, wait: bool = True) -> subprocess.Popen[bytes] | None:
    Path("script.sh").write_text(SCRIPT)
    plan = {"max_parallel": places, "jobs": [vars(job) for job in jobs]}
    Path("local1.json").write_text(json.dumps(plan))
    runner = subprocess.Popen([sys.executable, "-m", "dinoreg.jobs.local_queue", "local1.json"])
    if wait:
        assert runner.wait(60) == 0
        return None
    return runner


def trace() -> list[str]:
    return Path("trace").read_text().splitlines() if Path("trace").exists() else []


def state(job: str) -> str:
    return str(read_state(Path(), job)["state"])


def test_jobs_wait_for_those_they_come_after_and_for_a_place() -> None:
    run_plan(local_job("last", after=["a_0", "a_1", "bad"]), local_job("a_0"), local_job("a_1"), local_job("bad"))
    order = [line.rsplit(" ", 1)[0] for line in trace() if line.endswith("start")]
    assert order == ["a_0 0", "a_1 0", "bad 0", "last 0"]
    assert trace()[:4] == ["a_0 0 start", "a_0 0 end", "a_1 0 start", "a_1 0 end"]  # one at a time
    assert [state(job) for job in ("a_0", "a_1", "bad", "last")] == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]


def test_as_many_run_side_by_side_as_there_are_places() -> None:
    run_plan(local_job("a_0"), local_job("a_1"), local_job("a_2"), places=2)
    assert sorted(trace()[:2]) == ["a_0 0 start", "a_1 0 start"]
    assert trace().index("a_2 0 start") > 2


def test_a_job_that_asks_for_it_is_started_again() -> None:
    run_plan(local_job("again"))
    assert trace().count("again 0 start") == 3
    assert (state("again"), read_state(Path(), "again")["restarts"]) == ("COMPLETED", 2)


def test_one_process_that_fails_ends_the_others_of_its_job() -> None:
    begun = time.monotonic()
    run_plan(local_job("half", tasks=2))
    assert state("half") == "FAILED"
    assert time.monotonic() - begun < 20


def test_a_job_is_asked_to_save_before_its_limit_and_started_again() -> None:
    runner = run_plan(local_job("long", seconds=60, signal_seconds=59), wait=False)
    assert runner is not None
    until(lambda: trace().count("long 0 start") == 2, "a second start")
    assert trace()[1] == "asked"
    cancel_file(Path(), "long").write_text("now\n")
    assert runner.wait(60) == 0
    assert state("long") == "CANCELLED"


def test_a_cancelled_job_is_given_the_time_to_save_that_it_needs() -> None:
    runner = run_plan(local_job("polite"), local_job("after", after=["polite"]), wait=False)
    assert runner is not None
    until(lambda: "polite 0 start" in trace(), "a start")
    cancel_file(Path(), "after").write_text("now\n")
    cancel_file(Path(), "polite").write_text("save\n")
    assert runner.wait(60) == 0
    assert trace() == ["polite 0 start", "saved"]
    assert (state("polite"), state("after")) == ("COMPLETED", "CANCELLED")


@pytest.mark.slow
def test_a_limit_is_a_limit() -> None:
    run_plan(local_job("stubborn", seconds=1, setup=["trap '' TERM", "sleep 30"]))
    assert state("stubborn") == "TIMEOUT"


def test_the_runners_own_end_is_the_end_of_its_jobs() -> None:
    runner = run_plan(local_job("long"), local_job("next"), wait=False)
    assert runner is not None
    until(lambda: "long 0 start" in trace(), "a start")
    runner.terminate()
    assert runner.wait(60) == 0
    assert (state("long"), state("next")) == ("CANCELLED", "CANCELLED")


def test_a_runner_that_was_killed_is_noticed() -> None:
    add = record("local1.0", cluster="local", runner=[2**22 + 1, 5])
    launch = Path("run/launch")
    launch.mkdir(parents=True)
    add_records(launch, [add])
    (launch / "local1.0_local.json").write_text('{"state": "RUNNING", "begun": 1.0}')
    assert status_lines("run") == [
        "local1.0  pretrain: lost, its process is gone without an ending: the machine was restarted, or it was killed"
    ]
    me = os.getpid(), start_time(os.getpid())
    assert is_alive(*me)
    assert not is_alive(me[0], (me[1] or 0) + 1)


# ------------------------------------------------------------------------------------------------------------
# Whole launches on this machine


@pytest.mark.slow
def test_a_training_of_two_processes_survives_a_request_to_save(capsys: pytest.CaptureFixture[str]) -> None:
    changed: dict[str, Any] = {"steps": 40, "batch_size": 3, "checkpoint__every": 1000}
    on_processes(2, pretrain_each, [tiny_config("whole", threads=1, **changed)])
    options = [tiny_file("tiny", **changed), "out=run", LOCAL, "tasks_per_node=2"]
    assert main(["launch", "pretrain", *options]) == 0
    trains("run", 3)
    assert main(["launch", "pretrain", *options, "resume=true"]) == 2  # the folder is that job's
    assert "out=run: job local1.0 (pretrain) is still running; dinoreg launch cancel run" in capsys.readouterr().err
    processes = json.loads(Path("run/launch/local1.0_local.json").read_text())["processes"]
    os.kill(processes[1], signal.SIGUSR2)  # whoever hears it, all of them save the same step
    (job,) = ended("run")
    assert job.line == "local1.0  pretrain: finished, requeued once"
    assert loss_trace(Path("run")) == loss_trace(Path("whole"))
    assert main(["launch", "logs", "run", "lines=10"]) == 0
    assert "finished: 40 steps, 240 images -> run" in capsys.readouterr().out
    assert main(["launch", "cancel", "run"]) == 0
    assert capsys.readouterr().out == "nothing to cancel: all jobs are over\n"


@pytest.mark.slow
def test_evaluations_end_in_one_report_that_names_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(Path("run"), tiny_model())
    for name in ("shapes", "colours", "broken"):
        labelled_folder(Path(name))
    for path in Path("broken").rglob("*.png"):
        path.write_bytes(b"no picture")
    names = "shapes,colours,broken"
    assert main(["launch", "evaluate", names, f"weights={run}", *EVALUATION, LOCAL, "wait=true", "max_parallel=2"]) == 1
    said = capsys.readouterr()
    assert "evaluate broken: failed" in said.err
    results = run / "eval" / "0000007"
    table = (results / "table.md").read_text()
    assert "shapes" in table
    assert "colours" in table
    assert "broken" not in table
    assert "broken: failed" in (results / "report.html").read_text()
    assert not list((run / "launch" / "weights").rglob("*.safetensors"))
    assert [each.state for each in statuses(run)] == ["finished", "finished", "failed", "finished"]
    assert [each.record.job for each in statuses(run)] == ["local1.0_0", "local1.0_1", "local1.0_2", "local1.1"]
    assert len(read_records(run)) == 4
