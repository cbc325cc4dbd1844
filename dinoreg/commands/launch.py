"""`dinoreg launch`: what was typed becomes jobs; `status`, `logs` and `cancel` look after them.

`dinoreg.jobs` knows clusters and nothing of what a job does; the verbs that check and run its commands are joined to
it here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from dinoreg.commands.arguments import Verb, is_key_value, read_keys
from dinoreg.jobs.job_type import Request, find_job, job_files
from dinoreg.jobs.options import OPTION_NAMES, split_options
from dinoreg.runtime.errors import UserError

# What can be done with jobs that are there, and the keys of each: {name: (type, default)}.
ACTIONS: Mapping[str, Mapping[str, tuple[Any, Any]]] = {
    "status": {},
    "logs": {
        "job": (str | None, None),
        "task": (int, 0),
        "lines": (int, 40),
        "follow": (bool, False),
    },
    "cancel": {"job": (str | None, None), "save": (bool, False)},
}


def launch_command(arguments: Sequence[str], verbs: Mapping[str, Verb], run_verb: Callable[..., None]) -> None:
    """Run `dinoreg launch ARGUMENTS`; UserError for what is wrong with them, with nothing written or submitted.

    verbs     the verbs that a job may run
    run_verb  (verb, arguments, **hooks): runs one inside the job, which is pickled with the function's name
    """
    known = [*job_files(), *ACTIONS]
    if not arguments or is_key_value(arguments[0]):
        raise UserError(f"launch: missing JOB; expected {', '.join(known)}, or a .py of your own")
    name, *rest = arguments
    if name in ACTIONS:
        _act(name, rest)
        return
    _launch(name, rest, verbs, run_verb)


def _launch(name: str, arguments: Sequence[str], verbs: Mapping[str, Verb], run_verb: Callable[..., None]) -> None:
    from dinoreg.jobs.attempt import make_command
    from dinoreg.jobs.control import failed, follow
    from dinoreg.jobs.submit import launch, shown

    close = get_close_matches(name, ACTIONS, n=1, cutoff=0.75)
    if close and name not in job_files():
        raise UserError(f"launch: {name}: unknown job; did you mean {close[0]}?")
    job = find_job(name)
    plain = [argument for argument in arguments if not is_key_value(argument)]
    if len(plain) > 1:
        raise UserError(f"launch {job.name}: {plain[1]}: expected key=value; usage: dinoreg launch {job.usage}")
    keys = [argument for argument in arguments if is_key_value(argument)]
    options, overrides, given = split_options(keys)
    request = Request(plain[0] if plain else None, tuple(overrides), options, given, partial(check_command, verbs))
    try:
        launched = launch(job, request, partial(make_command, run_verb), _say)
    except UserError as error:
        raise _with_hint(error, overrides) from None
    if launched is None:  # a dry run
        return
    for group in dict.fromkeys(record.group for record in launched.records):
        jobs = [record for record in launched.records if record.group == group]
        names = jobs[0].job if len(jobs) == 1 else f"{jobs[0].job} to {jobs[-1].job}"
        _say(f"submitted: {group}, job {names}: {shown(jobs[0].command)}{' …' if len(jobs) > 1 else ''}")
    _say(f"dinoreg launch status {launched.folder}")
    if options.wait:
        try:
            problem = failed(follow(launched.folder, launched.records, _say))
        except KeyboardInterrupt:
            _say(f"the jobs go on; dinoreg launch cancel {launched.folder} ends them")
            raise
        if problem is not None:
            raise problem


def check_command(verbs: Mapping[str, Verb], arguments: Sequence[str]) -> None:
    """Refuse a command line that its verb would refuse, in the same words; nothing is started."""
    verb, *rest = arguments
    if verb not in verbs:
        raise UserError(f"{verb}: unknown verb; a job runs one of {', '.join(verbs)}")
    if verb == "pretrain":
        from dinoreg.config.load import load_config, require_complete

        require_complete(load_config(rest[0], rest[1:]))
    elif verb == "eval":
        from dinoreg.commands.evaluate import read_request

        read_request(rest[1:])
    elif verb == "embed":
        from dinoreg.commands.embed import read_options

        read_options(rest)
    else:
        read_keys(verb, verbs[verb], rest, None)


def _with_hint(error: UserError, overrides: Sequence[str]) -> UserError:
    """A misspelt key of the job is looked for among the command's: name the one that was meant."""
    text = str(error)
    for item in overrides:
        key = item.partition("=")[0]
        close = get_close_matches(key, OPTION_NAMES, n=1, cutoff=0.75)
        if close and text.startswith(f"{key}: unknown key") and f"did you mean {key}" not in text:
            return UserError(f"{key}: unknown key; did you mean {close[0]}? (dinoreg launch --help lists all)")
    return error


def _act(name: str, arguments: Sequence[str]) -> None:
    from dinoreg.jobs import control, status

    folders, values = _action_keys(name, arguments)
    if len(folders) != 1:
        problem = "missing RUN, the folder of the launch" if not folders else f"{folders[1]}: one folder at a time"
        raise UserError(f"launch {name}: {problem}")
    folder = folders[0]
    if name == "status":
        for line in status.describe(folder):
            _say(line)
    elif name == "logs":
        control.show_logs(folder, values["job"], values["task"], values["lines"], values["follow"], _write)
    else:
        control.cancel(folder, values["job"], values["save"], _say)


def _action_keys(name: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    from dinoreg.config.keys import nearest
    from dinoreg.config.values import Text, convert

    known = ACTIONS[name]
    values = {key: default for key, (_, default) in known.items()}
    plain = []
    for argument in arguments:
        if not is_key_value(argument):
            plain.append(argument)
            continue
        key, _, text = argument.partition("=")
        if key not in known:
            accepted = f"; accepted: {', '.join(known)}" if known else "; it takes no keys"
            raise UserError(f"{key}: unknown key of dinoreg launch {name}{nearest(key, known)}{accepted}")
        values[key] = convert(Text(text), known[key][0], key, "command line")
    return plain, values


def _say(line: str) -> None:
    print(line, flush=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
