"""The first hour: start-up without torch, usual spellings, help, examples, and the way from verb to verb."""

from __future__ import annotations

import configparser
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinoreg
from dinoreg.commands.arguments import canonical
from dinoreg.commands.completion import SHELLS, candidates, script_of
from dinoreg.commands.main import main
from dinoreg.commands.registry import VERBS
from dinoreg.runtime import guide
from dinoreg.runtime.errors import UserError
from dinoreg.scenes.render import render

QUICK = [
    *(
        "--help",
        "--version",
        "version",
        "train --help",
        "small --help",
        "eval --list",
        "eval --list pets",
        "launch --help",
    ),
    *(
        "pretrain nope=1",
        "pretrain vits14_reg4",
        "train vits14",
        "pretrain vits14_reg4 data=nope out=x",
        "pretrain . a=1",
    ),
    *("pretrain vits14_reg4 data=nope.pets:root=x out=x", "pretrain vits14_reg4 data=scenes out=x init=nope"),
    *("inspect data=nope", "plan nope", "plan vits14_reg4 gpus=0", "verdict nope weights=random:vitt14_reg4"),
    *("eval nope weights=random:vitt14_reg4", "eval pets weights=nope", "eval pets weights=random:vitt14_reg4"),
    *("embed nope weights=random:vitt14_reg4 out=x.parquet", "embed scenes weights=nope out=x.parquet", "export nope"),
    *("export weights=nope format=timm out=x", "view pca weights=nope", "view crops nope", "view foo", "report nope"),
    *("registers weights=nope images=scenes", "launch nope", "doctor nope", "quickstart foo=1", "completion bash"),
    *(
        "eval pets weights=random:vitt14_reg4 device=tpu",
        "completion words eval pe",
        "completion words pretrain small lo",
    ),
]


def in_a_new_process(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_what_computes_nothing_answers_without_torch(tmp_path: Path) -> None:
    code = f"""
import contextlib, io, sys
from dinoreg.commands.main import main
for line in {QUICK}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = main(line.split())
    assert status in (0, 2), (line, status)
    assert not {{"torch", "torchvision", "matplotlib", "sympy"}} & sys.modules.keys(), line
"""
    in_a_new_process(code, tmp_path)


@pytest.mark.slow
def test_training_and_classification_do_without_torchvisions_models(tmp_path: Path) -> None:
    modules = "train.loop commands.verdict commands.embed commands.registers evaluation.protocols.classification"
    names = [f"dinoreg.{name}" for name in modules.split()]
    code = f"import importlib, sys; [*map(importlib.import_module, {names})]; assert 'torchvision' not in sys.modules"
    in_a_new_process(code, tmp_path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with all that the examples name."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "scans", "labelled", "runs/a", "runs/b", "photos-512"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / "runs" / name / "config.yaml").write_text("data: photos\nout: runs/a\nsteps: 5\n")
    (tmp_path / "photo.jpg").touch()
    return tmp_path


FORMS = [
    "data=photos out=x batch_size=8 resume=true optim.lr=0.001",
    "--data photos --out x --batch_size 8 --resume --optim.lr 0.001",
    "--data=photos --out=x --batch-size=8 --resume=true --optim.lr=1e-3",
    "data = photos out = x batch_size= 8 resume optim.lr =0.001",
    "photos out=x —batch-size 8 resume --optim.lr=1e-3",
]


@pytest.mark.parametrize("form", FORMS)
def test_the_usual_ways_to_write_options_are_one(form: str, here: Path) -> None:
    verb = VERBS["pretrain"]
    first, given = (verb.parse(canonical(verb, ["small", *words.split()])) for words in (FORMS[0], form))
    assert given == first


def test_words_flags_and_paths_find_their_places(here: Path) -> None:
    assert canonical(VERBS["eval"], ["weights=x", "pets"]) == ["pets", "weights=x"]
    assert canonical(VERBS["eval"], ["--list", "pets"]) == ["pets", "--list"]
    assert canonical(VERBS["inspect"], ["photos", "scans", "--sample", "5"]) == ["data=photos,scans", "sample=5"]
    assert canonical(VERBS["view"], ["pca", "photo.jpg", "--layer", "-1"]) == ["pca", "images=photo.jpg", "layer=-1"]
    assert canonical(VERBS["export"], ["runs/a", "format=timm"]) == ["weights=runs/a", "format=timm"]
    options = VERBS["inspect"].parse(["data=photos,scans"])[0]
    assert options.data == ["photos", "scans"]  # and without brackets, which zsh takes for a pattern


@pytest.mark.parametrize(
    ("given", "better"),
    [
        ("pretrian small data=photos out=x", "pretrain small data=photos out=x"),
        ("pretrain small learning_rate=1e-3 data=photos", "pretrain small optim.lr=1e-3 data=photos"),
        ("pretrain smal data='my photos'", "pretrain small 'data=my photos'"),
        ("pretrain small loss.centering=sinkhron", "pretrain small loss.centering=sinkhorn"),
        ("embed images=photos weights=x out=x", "embed data=photos weights=x out=x"),
        ("eval pest,cars weights=random:vitt14_reg4", "eval pets,cars weights=random:vitt14_reg4"),
        ("view pac weights=x", "view pca weights=x"),
        ("pretrain photos steps=5", "pretrain small data=photos out=runs/photos steps=5"),
    ],
)
def test_a_refusal_ends_with_the_corrected_command(
    given: str, better: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(given)) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"Write: dinoreg {better}")


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_the_terminal(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for columns in (80, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main([*verb.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= columns
        assert "examples:" in text


def test_help_of_one_section_has_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "small", "--help", "optim"]) == 0
    text = capsys.readouterr().out
    assert "  optim.lr=0.002 " in text
    assert "loss." not in text


TEXTS = configparser.ConfigParser(interpolation=None, delimiters=("=",))
TEXTS.read(Path(guide.__file__).with_name("templates") / "guide.ini", encoding="utf-8")
COMMANDS = [
    (section, key, line.partition("    ")[0])
    for section in TEXTS.sections()
    for key, text in TEXTS[section].items()
    if key.startswith(("next", "examples"))
    for line in text.strip().splitlines()
    if line.startswith("dinoreg ") and "VERB" not in line and "> ~" not in line
]


@pytest.mark.parametrize(("section", "key", "line"), COMMANDS)
def test_every_example_and_every_next_command_is_accepted(section: str, key: str, line: str, here: Path) -> None:
    values = {"weights": "runs/a", "images": "photos", "data": "photos", "stem": "a", "first": "labelled", "out": "x"}
    values |= {
        "config": "small",
        "folder": "photos-9",
        "more": guide.Verbatim(""),
        "columns": guide.Verbatim(""),
        "format": "timm",
        "rest": guide.Verbatim("data=photos" if section == "plan" else "steps=5"),
        "source": "photos",
    }
    if section in ("plan", "view"):
        values["first"] = "small"
    if section in ("report", "doctor"):
        values["first"] = "runs/a"
    if key.startswith("next"):
        chosen = TEXTS[section][key].strip().splitlines().index(line)
        line = guide.next_commands(section, values, key.removeprefix("next").strip())[chosen]
    _, name, *arguments = shlex.split(line.partition(" (")[0])
    if "--help" not in arguments:
        VERBS[name].parse(canonical(VERBS[name], arguments))


def test_a_list_ends_with_the_command_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert max(map(len, said.out.splitlines())) <= 80


@pytest.mark.slow
def test_the_next_command_has_the_words_of_this_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in {
        "doctor": "next: dinoreg inspect data=FOLDER (of your own pictures)\n  or: dinoreg quickstart\n",
        "doctor runs/a": "next: dinoreg pretrain runs/a resume=true\n",
        "runs": "next: dinoreg report runs\n",
        "view crops small data=scenes num=1 out=x": "next: dinoreg pretrain small data=scenes out=runs/first\n",
    }.items():
        assert main(arguments.split()) == 0
        assert capsys.readouterr().err.endswith(said)


def test_columns_may_stand_behind_their_table() -> None:
    for verb, given, parsed in (
        ("eval", "a.csv:path=f,label=c weights=w", "a.csv weights=w columns=path:f,label:c"),
        ("embed", "data=a.CSV:path=f", "data=a.CSV columns=path:f"),
        ("pretrain", "small data=x/a.tsv:path=f", "small data=x/a.tsv data.columns=path:f"),
        ("pretrain", "small probe.data=a.csv:label=c,path=f", "small probe.data=a.csv probe.columns=label:c,path:f"),
        ("export", "weights=a.csv:path=f", "weights=a.csv:path=f"),
    ):
        assert canonical(VERBS[verb], given.split()) == parsed.split()


@pytest.mark.slow
def test_the_next_command_reads_the_table_as_this_one_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(20):
        draw = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(draw).save(tmp_path / f"{index}.png")
    table = tmp_path / "odd.csv"
    table.write_text("what,which,taken\n" + "".join(f"{index % 2},{index}.png,x\n" for index in range(20)))
    sizes = ["steps=1", "batch_size=2", "crops.num_local=2"]
    run = tmp_path / "run"

    def after(*command: str) -> list[str]:
        assert main([*command]) == 0
        said = capsys.readouterr()
        lines = (said.out + said.err).splitlines()
        (line,) = [line.removeprefix("next: dinoreg ") for line in lines if line.startswith("next: ")]
        return shlex.split(line)

    _, *words = after("inspect", f"{table}:path=which", "range=0,255")
    assert words[:3] == ["small", f"data={table}", "out=runs/odd"]
    assert words[3:5] == ["data.columns=path:which", "data.range=0.0,255.0"]
    command = after(
        "pretrain",
        "small",
        *words[3:5],
        *sizes,
        f"data={table}",
        f"out={run}",
        f"probe.data={table}:path=which,label=what",
    )
    assert command == ["verdict", str(table), f"weights={run}", "columns=path:which,label:what"]
    command = after("eval", *command[1:], "protocols=knn", "own.root=" + str(tmp_path))
    assert command == [
        *("verdict", str(table), f"weights={run}", "columns=path:which,label:what", f"own.root={tmp_path}")
    ]


def test_words_are_completed(here: Path) -> None:
    assert candidates(VERBS, ["pre"]) == ["pretrain"]
    assert candidates(VERBS, ["pretrain", "vits"]) == ["vits14_reg4"]
    assert candidates(VERBS, ["pretrain", "small", "loss.centering"]) == ["loss.centering="]
    assert candidates(VERBS, ["pretrain", "small", "loss.centering=s"]) == [
        *("loss.centering=softmax", "loss.centering=sinkhorn")
    ]
    assert candidates(VERBS, ["pretrain", "small", "data=photos,sc"]) == ["data=photos,scans/"]
    assert candidates(VERBS, ["eval", "pe"]) == ["pets"]
    for shell in SHELLS:
        assert "dinoreg completion words" in script_of(shell)


def test_bash_completes_behind_an_equals_sign(here: Path) -> None:
    typed = "dinoreg pretrain small loss.centering=si"
    lines = [
        f'dinoreg() {{ {shlex.quote(sys.executable)} -m dinoreg "$@"; }}',
        script_of("bash"),
        f"COMP_LINE={shlex.quote(typed)} COMP_POINT={len(typed)}; _dinoreg; echo ${{COMPREPLY[*]}}",
    ]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, env={**os.environ})
    assert done.stdout == "sinkhorn\n", done.stderr


TYPED = [
    ("dinoreg pretr", "dinoreg pretrain"),
    ("dinoreg pretrain small loss.centering=si", "dinoreg pretrain small loss.centering=sinkhorn"),
    ("dinoreg pretrain small data=sca", "dinoreg pretrain small data=scans"),
]


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes(here: Path) -> None:
    script = [f"function dinoreg; {shlex.quote(sys.executable)} -m dinoreg $argv; end", script_of("fish")]
    script += [f"complete -C {shlex.quote(typed)}" for typed, _ in TYPED]
    environment = {**os.environ, "HOME": str(here)}
    done = subprocess.run(["fish", "-c", "\n".join(script)], capture_output=True, text=True, env=environment)
    found = [line.rstrip("/") for line in done.stdout.splitlines()]
    assert found == [better.split()[-1] for _, better in TYPED], done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_what_is_typed_before_a_tab(here: Path) -> None:
    import pty

    (here / "completion.zsh").write_text(script_of("zsh"))
    child, terminal = pty.fork()
    if not child:
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb", "HOME": str(here)})
    shown = ""

    def wait_for(text: str) -> None:
        nonlocal shown
        end = time.monotonic() + 60
        while text not in shown.replace("\a", "") and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
        assert text in shown.replace("\a", "")  # it rings where more may follow

    try:
        setup = ["autoload -Uz compinit; compinit -u -D", "source completion.zsh", "print re''ady"]
        setup.insert(1, f'dinoreg() {{ {shlex.quote(sys.executable)} -m dinoreg "$@"; }}')
        os.write(terminal, "".join(f"{line}\n" for line in setup).encode())
        wait_for("\nready")
        for typed, better in TYPED:
            os.write(terminal, f"{typed}\t".encode())
            wait_for(better)
            os.write(terminal, b"\x15")  # clears the line
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


# A copy of smaller pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name, size in {
        "cat/a.jpg": (90, 60),
        "cat/b.png": (40, 80),
        "dog/c.bmp": (70, 50),
        "dog/d.png": (20, 30),
    }.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "dog" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    return tmp_path / "photos"


def test_a_smaller_copy_keeps_places_and_goes_on_where_it_was_stopped(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = pictures.with_name("small")
    command = ["inspect", str(pictures), f"prepare={small}", "side=30"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == f"prepared: {small}\n"
    assert "4 of 5 images; left out: " in captured.err
    assert f"next: dinoreg pretrain small data={small} out=runs/small probe.data={small}" in captured.err
    files = {str(path.relative_to(small)): path for path in small.rglob("*.*") if path.suffix != ".json"}
    sizes = {name: Image.open(path).size for name, path in files.items()}
    assert sizes == {"cat/a.jpg": (45, 30), "cat/b.png": (30, 60), "dog/c.bmp.png": (42, 30), "dog/d.png": (20, 30)}
    assert files["dog/d.png"].read_bytes() == (pictures / "dog" / "d.png").read_bytes()
    before = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in files.items()}
    files["cat/b.png"].unlink()
    assert main(command) == 0
    after = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in files.items()}
    assert after["cat/b.png"][0] == before.pop("cat/b.png")[0]
    assert {name: after[name] for name in before} == before
    capsys.readouterr()
    assert main([*command, "longest"]) == 2
    assert "not prepared with these options" in capsys.readouterr().err


def test_a_copy_is_refused_where_it_would_spoil_something(pictures: Path, tmp_path: Path) -> None:
    from dinoreg.commands.inspect import prepare
    from dinoreg.commands.options import InspectOptions

    (pictures.with_name("diary")).write_text("mine")
    for target in (pictures, pictures / "inside", pictures.with_name("diary")):
        with pytest.raises(UserError, match="prepare="):
            prepare(InspectOptions(str(pictures), prepare=str(target)))
    (pictures / "masks").mkdir()
    with pytest.raises(UserError, match="masks"):
        prepare(InspectOptions(str(pictures), prepare=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_a_folder_of_shards_is_not_copied_nor_offered_to_be(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoreg.data.statistics.LARGE", 1000)
    assert main(["inspect", str(pictures)]) == 0
    assert "prepare=" in "".join(capsys.readouterr())
    shards = tmp_path / "a" / "b" / "shards"
    shards.mkdir(parents=True)
    with tarfile.open(shards / "0.tar", "w") as archive:
        for name in ("../../../../evil.jpg", "good.jpg"):
            archive.add(pictures / "cat" / "a.jpg", name)
    target = tmp_path / "a" / "b" / "c" / "small"
    assert main(["inspect", str(shards), f"prepare={target}", "side=30"]) == 2
    assert "holds shards, expected a folder of files" in capsys.readouterr().err
    assert not target.exists()
    assert not list(tmp_path.rglob("evil.jpg"))
    assert main(["inspect", str(shards)]) == 0
    assert "prepare=" not in "".join(capsys.readouterr())


@pytest.mark.slow
def test_from_a_clone_to_a_verdict_each_command_names_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for index in range(300):
        scene = render(index, 40 + index % 30)
        path = tmp_path / "my pictures" / f"class {scene.label % 3}" / f"IMG {index:04d}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(path, "JPEG")
    given = ["git clone", "pip install", "dinoreg doctor"]
    shorter = {"pretrain": ["steps=3"], "verdict": ["repeats=1"]}
    while not given[-1].startswith("dinoreg verdict"):
        _, verb, *arguments = shlex.split(given[-1])
        assert main([verb, *arguments, *shorter.get(verb, [])]) == 0
        said = capsys.readouterr().err.splitlines()
        (line,) = [line.removeprefix("next: ") for line in said if line.startswith("next: ")]
        given.append(line.partition(" (")[0].replace("FOLDER", "'my pictures'"))
    _, verb, *arguments = shlex.split(given[-1])
    assert main([verb, *arguments, *shorter[verb]]) == 0
    assert [words.split()[1] for words in given] == ["clone", "install", "doctor", "inspect", "pretrain", "verdict"]
    assert "verdict: " in (printed := capsys.readouterr().out)
    assert Path(printed.partition("page: ")[2].splitlines()[0]).is_file()


def test_inspect_is_a_function_too(pictures: Path) -> None:
    found = dinoreg.inspect(pictures, sample=3)
    assert (found["images"], found["looked_at"], found["large"]) == (5, 3, 0)
