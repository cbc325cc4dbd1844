"""The command line: what each verb does with its arguments, and how every kind of ending looks."""

from __future__ import annotations

import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dinoreg
from dinoreg.commands import registry
from dinoreg.commands.main import main
from dinoreg.commands.registry import VERBS
from dinoreg.config.load import Config
from dinoreg.config.option import describe
from dinoreg.runtime.errors import Interrupted, RunError, UserError


class Stage:
    """Stands in for the parts behind the verbs and notes how they were called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch = monkeypatch
        self.folder = folder
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def put(self, module: str, **functions: Callable[..., Any]) -> None:
        """Replace a module by one that has these functions only."""
        fake = types.ModuleType(module)
        for name, function in functions.items():
            setattr(fake, name, self._noting(name, function))
        self.monkeypatch.setitem(sys.modules, module, fake)

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return function(*args, **kwargs)

        return noting

    def run_folder(self, name: str = "run") -> Path:
        run = self.folder / name
        run.mkdir()
        (run / "config.yaml").write_text("seed: 1\n")
        return run


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DINOREG_DEBUG", raising=False)
    monkeypatch.setattr(registry, "check_early", lambda parsed: None)  # whose files are not there
    return Stage(monkeypatch, tmp_path)


def fail_with(error: BaseException) -> Callable[..., Any]:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error

    return failing


PRETRAIN = ["pretrain", "vits14_reg4", "data=photos", "out=runs/a"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; nothing else was printed."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("dinoreg: ")
    return captured.err.strip().removeprefix("dinoreg: ")


# The verbs


def test_pretrain_resolves_the_config_trains_and_reports(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.put("dinoreg.train.loop", pretrain=lambda config: Path(config.out))
    stage.put("dinoreg.commands.report", report_run=lambda run: run / "report.html")
    assert main([*PRETRAIN, "steps=5", "optim.lr=1e-3"]) == 0
    (name, (config,), _), reported = stage.calls
    assert name == "pretrain"
    assert isinstance(config, Config)
    assert (config.out, config.data.source, config.steps) == ("runs/a", "photos", 5)
    assert (config.optim.lr, config.loss.centering) == (1e-3, "sinkhorn")
    assert reported == ("report_run", (Path("runs/a"),), {})
    assert "report: runs/a/report.html" in capsys.readouterr().out


def test_pretrain_resumes_from_a_run_folder(stage: Stage) -> None:
    run = stage.run_folder()
    (run / "config.yaml").write_text(f"out: {run}\nsteps: 5\ndata: photos\n")
    stage.put("dinoreg.train.loop", pretrain=lambda config: Path(config.out))
    stage.put("dinoreg.commands.report", report_run=lambda run: run / "report.html")
    assert main(["pretrain", str(run), "resume=true"]) == 0
    config = stage.calls[0][1][0]
    assert (config.out, config.steps, config.resume) == (str(run), 5, True)


def test_a_run_goes_on_where_it_lies_and_not_where_it_was_written(stage: Stage) -> None:
    run, other = stage.run_folder(), stage.folder / "other"
    (run / "config.yaml").write_text(f"out: {stage.folder / 'where it was'}\nsteps: 5\ndata: photos\n")
    (run / "owner.json").write_text("{}")
    stage.put("dinoreg.train.loop", pretrain=lambda config: Path(config.out))
    stage.put("dinoreg.commands.report", report_run=lambda run: run / "report.html")
    assert main(["pretrain", str(run), "resume=true"]) == 0
    assert main(["pretrain", str(run), "overwrite=true"]) == 0
    assert main(["pretrain", str(run / "config.yaml"), "resume=true"]) == 0
    assert main(["pretrain", str(run), "resume=true", f"out={other}"]) == 0
    assert [call[1][0].out for call in stage.calls if call[0] == "pretrain"] == [*[str(run)] * 3, str(other)]


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a\udcff", "a" * 300, "b/" * 800])
def test_a_name_that_nothing_can_be_called_is_refused(
    name: str, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = f"out={stage.folder}/{name}"
    for verb in (["pretrain", "quickstart", "data=scenes"], ["embed", "data=scenes", "weights=x"], ["quickstart"]):
        assert main([*verb, f"{keys}.parquet"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("dinoreg: out=")
    assert not list(stage.folder.glob("a*"))


def test_quickstart_passes_its_keys_on(stage: Stage) -> None:
    stage.put("dinoreg.commands.quickstart", quickstart=lambda out, seed, overwrite: Path("x"))
    assert main(["quickstart"]) == 0
    assert main(["quickstart", "out=runs/my run", "seed=3", "overwrite=true"]) == 0
    assert stage.calls == [
        ("quickstart", (None,), {"seed": 0, "overwrite": False}),
        ("quickstart", ("runs/my run",), {"seed": 3, "overwrite": True}),
    ]


def test_report_writes_one_runs_report_and_compares_several(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = stage.run_folder("a"), stage.run_folder("b=1")
    reports = {
        "report_run": lambda run: run / "report.html",
        "compare_runs": lambda runs, out: out or Path("compare.html"),
    }
    stage.put("dinoreg.commands.report", **reports)
    assert main(["report", str(a)]) == 0
    assert main(["report", str(a), str(b)]) == 0
    assert main(["report", str(a), "b=1", "out=both.html"]) == 0
    assert stage.calls == [
        ("report_run", (a,), {}),
        ("compare_runs", ([a, b], None), {}),
        ("compare_runs", ([a, Path("b=1")], Path("both.html")), {}),
    ]
    assert capsys.readouterr().out.splitlines()[-1] == "report: both.html"


def test_inspect_prints_what_it_found(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "data=scenes:count=9,size=48", "sample=5"]) == 0
    assert "9 images, 5 looked at" in capsys.readouterr().out


def test_doctor_looks_at_the_machine_or_at_a_run(stage: Stage) -> None:
    run = stage.run_folder()
    stage.put("dinoreg.commands.doctor", doctor=lambda run: None)
    assert main(["doctor"]) == 0
    assert main(["doctor", str(run)]) == 0
    assert stage.calls == [("doctor", (None,), {}), ("doctor", (run,), {})]


# Help and version


def test_version_and_help_answer_without_doing_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dinoreg {dinoreg.__version__}\n"
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize("verb", list(VERBS))
def test_the_help_of_a_verb_lists_its_keys(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: dinoreg {verb}")
    words = " ".join(text.split())
    for cls in (VERBS[verb].options, *VERBS[verb].kinds.values()):
        for key, kind, meaning in describe(cls):
            value = kind.partition(" = ")[2].replace(", ", ",")
            assert f" {key}={value} {meaning}" in words or len(value) > 60


def test_the_help_of_a_config_shows_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--help"]) == 0
    defaults = capsys.readouterr().out.splitlines()
    assert main(["pretrain", "vits14_reg4", "seed=7", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for value in ("loss.centering=sinkhorn", "optim.beta2=0.99", "seed=7"):
        assert any(f"{line} ".startswith(f"  {value} ") for line in lines)
        assert not any(f"{line} ".startswith(f"  {value} ") for line in defaults)
    assert any("vits14_reg4" in line and line.startswith("CONFIG:") for line in lines)


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "dinoreg", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"dinoreg {dinoreg.__version__}\n")


# Refusals: one line, exit code 2, nothing written


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrian"], "pretrian: unknown verb; did you mean pretrain?"),
        (["xyz"], "xyz: unknown verb; known: quickstart, pretrain"),
        (
            ["quickstart", "steps=5"],
            "steps: unknown key (command line); accepted: out, seed, overwrite",
        ),
        (["quickstart", "sed=5"], "sed: unknown key (command line); did you mean seed?"),
        (["quickstart", "runs/a"], "runs/a: unexpected; expected key=value"),
        (["pretrain"], "pretrain: missing CONFIG"),
        (["pretrain", "vits14"], "config vits14: unknown; did you mean vits14_reg4?"),
        ([*PRETRAIN, "photos2"], "pretrain: photos2: expected key=value"),
        ([*PRETRAIN, "optim.rl=1"], "optim.rl: unknown key (command line); did you mean optim.lr?"),
        ([*PRETRAIN, "steps=none"], "no budget: give one of"),
        (["pretrain", "vits14_reg4", "data=x"], "out: missing"),
        (["pretrain", "vits14_reg4", "out=x"], "data: missing"),
        (["report"], "report: missing RUN"),
        (["report", "nowhere"], "report: nowhere: expected the folder of a run"),
        (["report", "."], "report: .: expected the folder of a run"),
        (["inspect"], "data= is missing: a folder of images"),
        (["inspect", "data=x", "sample=0"], "sample=0: expected at least 1 image"),
        (["doctor", "a", "b"], "b: unexpected"),
        (["doctor", "nowhere"], "doctor: nowhere: expected the folder of a run"),
        (["doctor", "x=1"], "x: unknown key (command line); it takes no keys"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_written(
    arguments: list[str], expected: str, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (
        "dinoreg.train.loop",
        "dinoreg.commands.quickstart",
        "dinoreg.data.statistics",
        "dinoreg.reports.run_report",
    ):
        stage.put(module)  # nothing of it may be reached
    assert main(arguments) == 2
    assert one_line(capsys).startswith(expected)
    assert list(stage.folder.iterdir()) == []


def test_what_a_part_refuses_is_one_line_too(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.put("dinoreg.train.loop", pretrain=fail_with(UserError("data=photos:\n  no such folder")))
    assert main(PRETRAIN) == 2
    assert one_line(capsys) == "data=photos: no such folder"


# The same with nothing replaced: what only the data, the weights and the folders can tell


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data=nowhere"], "nowhere"),
        (["data=empty"], "empty"),
        (["data=nowhere.txt"], "nowhere.txt"),
        (["data=broken.txt"], "broken.txt"),
        (["data=scenes:count=0"], "count"),
        (["data=scenes:colour=red"], "colour"),
        (["out=full"], "full: not empty; use resume=true to go on, overwrite=true to start anew"),
        (["out=full", "overwrite=true"], "it is not overwritten"),
        (["out=full", "resume=true"], "holds no run to resume"),
        (["out=notes.txt"], "is a file, expected a folder"),
        (["init=nowhere.pth"], "nowhere.pth"),
        (["init=notes.txt"], "notes.txt"),
        (["init=vitt16_reg4"], "vitt16_reg4"),
        (["device=tpu"], "device=tpu: expected auto, cpu, cuda"),
        (["probe.data=nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_run_cannot_start_from_is_one_line_with_exit_code_2_and_nothing_written(
    overrides: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/diary.txt").write_text("mine")
    Path("notes.txt").write_text("no weights")
    Path("broken.txt").write_text("../../etc/passwd\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = {item.partition("=")[0] for item in overrides}
    usual = [
        item for item in ("device=cpu", "data=scenes:count=9,size=48", "out=run") if item.partition("=")[0] not in given
    ]
    assert main(["pretrain", "quickstart", "steps=1", *usual, *overrides]) == 2
    assert expected in one_line(capsys)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert not (tmp_path / "run").exists()


# Failures


def test_a_failed_run_names_its_log(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    log = stage.folder / "runs" / "a" / "train.log"
    log.parent.mkdir(parents=True)
    log.write_text("line\n")
    stage.put("dinoreg.train.loop", pretrain=fail_with(RunError("the disk is full")))
    assert main(PRETRAIN) == 1
    assert one_line(capsys) == "the disk is full (log: runs/a/train.log)"
    assert log.read_text() == "line\n"


def test_an_unexpected_error_leaves_its_traceback_in_the_runs_log(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    (stage.folder / "runs" / "a").mkdir(parents=True)
    (stage.folder / "runs" / "a" / "config.yaml").write_text("seed: 0\n")
    stage.put("dinoreg.train.loop", pretrain=fail_with(KeyError("cls_token")))
    assert main(PRETRAIN) == 1
    line = one_line(capsys)
    assert line == "KeyError: 'cls_token' (traceback: runs/a/train.log)"
    logged = (stage.folder / "runs" / "a" / "train.log").read_text()
    assert logged.startswith("Traceback (most recent call last)")
    assert logged.rstrip().endswith("KeyError: 'cls_token'")


def test_an_unexpected_error_writes_nothing_into_a_folder_that_is_no_run(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.put("dinoreg.train.loop", pretrain=fail_with(KeyError("x")))
    assert main(PRETRAIN) == 1
    assert one_line(capsys) == "KeyError: 'x' (DINOREG_DEBUG=1 shows the traceback)"
    assert list(stage.folder.iterdir()) == []
    somebody_elses = stage.folder / "runs" / "a"
    somebody_elses.mkdir(parents=True)
    assert main(PRETRAIN) == 1
    assert list(somebody_elses.iterdir()) == []


def test_the_traceback_is_shown_on_request(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOREG_DEBUG", "1")
    stage.put("dinoreg.train.loop", pretrain=fail_with(KeyError("x")))
    assert main(PRETRAIN) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.splitlines()[-1] == "dinoreg: KeyError: 'x'"


def test_a_torchvision_of_another_build_is_named_with_its_remedy(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("operator torchvision::nms does not exist")
    stage.put("dinoreg.train.loop", pretrain=fail_with(error))
    assert main(PRETRAIN) == 1
    line = one_line(capsys)
    assert "not from the same build" in line
    assert "pip install" in line


# Interruptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_ended_a_run_is_its_exit_code(
    number: int, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = Interrupted("stopped after step 3; go on with resume=true", number)
    stage.put("dinoreg.train.loop", pretrain=fail_with(stopped))
    assert main(PRETRAIN) == 128 + number
    assert one_line(capsys) == "stopped after step 3; go on with resume=true"


def test_control_c_before_anything_was_saved_just_ends(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.put("dinoreg.train.loop", pretrain=fail_with(KeyboardInterrupt()))
    assert main(PRETRAIN) == 130
    assert one_line(capsys) == "interrupted"


def test_control_c_after_a_checkpoint_says_how_to_go_on(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    last = stage.folder / "runs" / "a" / "checkpoints" / "last"
    last.parent.mkdir(parents=True)
    last.write_text("step_0000005\n")
    stage.put("dinoreg.train.loop", pretrain=fail_with(KeyboardInterrupt()))
    assert main(PRETRAIN) == 130
    assert one_line(capsys) == "interrupted; go on with: dinoreg pretrain runs/a resume=true"


def test_output_into_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m dinoreg pretrain --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


# The Python API is the same command


def test_the_python_api_trains_what_the_command_line_trains(stage: Stage) -> None:
    stage.put("dinoreg.train.loop", pretrain=lambda config: Path(config.out))
    stage.put("dinoreg.commands.report", report_run=lambda run: run)
    run = dinoreg.pretrain("vits14_reg4", data="photos", out="runs/a", steps=50, **{"optim.lr": 1e-3})
    assert run == Path("runs/a")
    assert main([*PRETRAIN, "steps=50", "optim.lr=1e-3"]) == 0
    assert stage.calls[0] == stage.calls[1]


def test_the_python_api_refuses_with_a_value_error(stage: Stage) -> None:
    with pytest.raises(ValueError, match="did you mean steps"):
        dinoreg.pretrain("vits14_reg4", data="photos", out="runs/a", step=50)
    with pytest.raises(UserError, match="out: missing"):
        dinoreg.pretrain("vits14_reg4", data="photos")
