"""Evaluate an encoder: datasets are checked first, measured next to their baselines, written as they are finished.
`preflight` reads every split file and a sample of images before anything is computed. Every finished (dataset,
protocol, encoder) is saved at once, so that an interrupted evaluation resumes.
"""

import dataclasses
import functools
import hashlib
import json
import pkgutil
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.config.option import check, flat
from dinoreg.data.copies import MOST_COMPARED
from dinoreg.data.statistics import survey
from dinoreg.data.value_range import BadImage, ValueRange
from dinoreg.evaluation.backbones.encoder import PUBLISHED_SIZE, Encoder, PixelEncoder
from dinoreg.evaluation.benchmark import PROTOCOLS, Benchmark, Task
from dinoreg.evaluation.comparison import compared, doubts
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.features.images import read_with_truth
from dinoreg.evaluation.metrics.depth import outside_limits
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.request import Request, folder_of
from dinoreg.evaluation.result import Result, Row, plain
from dinoreg.runtime.digest import content_digest
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.runtime.json_files import read_json
from dinoreg.runtime.parallel import default_workers, parallel, show_progress

SAMPLED = 8  # images of each split that are opened before anything is computed


@dataclass(frozen=True)
class Planned:
    """A dataset that is complete on disk: each task with its data, and warnings for the user."""

    benchmark: Benchmark
    tasks: tuple[tuple[Task, Data], ...]
    warnings: tuple[str, ...] = ()


def preflight(chosen: Sequence[Benchmark], request: Request) -> tuple[list[Planned], dict[str, str]]:
    """Check everything that can be known before the first forward pass.

    returns  the datasets that are ready, and {dataset: what is wrong} for the others
    raises   UserError for options of datasets that are not evaluated
    """
    known = {name for benchmark in chosen for name in (benchmark.name, *benchmark.aliases)}
    for name in request.dataset:
        if name not in known:
            evaluated = ", ".join(benchmark.name for benchmark in chosen)
            raise UserError(f"{name}: neither a key nor a dataset that is evaluated here ({evaluated})")
    ready, problems = [], {}
    for benchmark in chosen:
        try:
            ready.append(_plan(benchmark, request))
        except UserError as error:
            said = str(error)
            problems[benchmark.name] = said if benchmark.name in said else f"{benchmark.name}: {said}"
    return [plan for plan in ready if plan.tasks], problems


def _plan(benchmark: Benchmark, request: Request) -> Planned:
    values = benchmark.option_values(request.dataset.get(benchmark.name, {}))
    folder, wanted = folder_of(benchmark, request), request.options.protocols
    tasks, warnings = [], []
    seen: dict[Callable, Data] = {}
    for task in benchmark.tasks:
        if task.protocol not in wanted if wanted else task.asked:
            continue
        if absent := [need for need in task.needs if not need.met(folder)]:
            warnings.append(f"{benchmark.name}: left out {task.protocol}: {absent[0].message(folder)}")
            continue
        if task.read not in seen:
            seen[task.read] = task.read(folder, values)
            _sample(benchmark, seen[task.read], own=False)
        data = seen[task.read]
        warnings += data.extra.get("warnings", [])
        if "samples" in data.extra:
            limits = _effective(request, task, data, PUBLISHED_SIZE).depth
            warnings += outside_limits(data.extra["samples"], limits.min_depth, limits.max_depth)
        tasks.append((task, data))
        for split, count in task.counts.items():
            found = len(data.splits[split]) if split in data.splits else 0
            if found != count:
                warnings.append(f"{benchmark.name}: {split} has {found:,} images, the official one {count:,}")
    return Planned(benchmark, tuple(tasks), _distinct(warnings, request))


def look(encoder: Encoder, plan: Planned, request: Request) -> Planned:
    """A plan whose pictures are read as an encoder takes them; of one's own some are opened, and warned of.

    raises  UserError for pictures that it cannot take, before anything is computed
    """
    warnings = [*plan.warnings, *check_channels(encoder, plan), *watched_images(encoder, plan)]
    whose = "the range of the weights," if request.options.range is None else "range"
    _read_as_taken(encoder, plan, request)
    for data in {id(data): data for _, data in plan.tasks}.values():
        _sample(plan.benchmark, data, own=True)
        for name, split in data.splits.items():
            if split.source.as_trained:
                found = survey(split.source, encoder.in_channels, SAMPLED, whose, "range").warnings
                warnings += [f"{line} ({name})" for line in found]
    return replace(plan, warnings=_distinct(warnings, request))


def _read_as_taken(encoder: Encoder, plan: Planned, request: Request) -> None:
    """Have the pictures read with the channels that an encoder takes, by the range given or that of its weights."""
    value_range = ValueRange.of(request.options.range) or encoder.preprocessing.value_range
    for _, data in plan.tasks:
        for split in data.splits.values():
            split.source.value_range, split.source.in_channels = value_range, encoder.in_channels


def _distinct(warnings: Sequence[str], request: Request) -> tuple[str, ...]:
    """The warnings once each; UserError for any where the request is strict."""
    if warnings and request.options.strict:
        raise UserError(f"{'; '.join(dict.fromkeys(warnings))} (strict=true)")
    return tuple(dict.fromkeys(warnings))


def _sample(benchmark: Benchmark, data: Data, own: bool) -> None:
    """Open some images of each split and their ground truth; UserError for the first that is wrong.

    own  only the user's own, whose pixels wait for the encoder's channels and range; else only the others
    """
    for name, split in data.splits.items():
        if not len(split):
            raise UserError(f"{benchmark.name}: the {name} split has no images")
        if split.source.as_trained != own:
            continue
        for index in np.unique(np.linspace(0, len(split) - 1, SAMPLED).astype(int)).tolist():
            read_with_truth(split, index)


def measure(encoder: Encoder, plan: Planned, request: Request, folder: Path) -> Result:
    """Measure a dataset that was looked at, write `folder/<dataset>.json`; a result with the same key is read instead.

    raises  UserError or RunError, naming dataset and protocol, where a task fails; finished tasks are saved, and the
            same call resumes after them
    """
    return _Evaluation(encoder, plan, request, folder).result()


def read_result(path: Path) -> Result | None:
    """The result in a file; None without a file, or where it is torn or of another kind."""
    try:
        return Result.from_dict(read_json(path))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


class _Evaluation:
    """One dataset with one encoder and its baselines; finished tasks are saved under a key over all their inputs."""

    def __init__(self, encoder: Encoder, plan: Planned, request: Request, folder: Path) -> None:
        self.encoder, self.plan, self.request, self.folder = encoder, plan, request, folder
        self.name = plan.benchmark.name
        sources = [split.source for _, data in plan.tasks for split in data.splits.values()]
        own = all(source.as_trained for source in sources)
        default = min(encoder.preprocessing.size) if own else encoder.default_size
        self.image_size = request.options.image_size or default
        self.key = _key(encoder, plan, request, self.image_size)
        self.unfinished = folder / ".unfinished" / f"{self.name}-{self.key}"

    def path(self) -> Path:
        """The file of the result: where it is, else the first name that no other measurement has.

        The names are `<dataset>.json`, for other data of one's own of that name the longer one, then one with the key.
        With overwrite=true the first gives way.
        """
        benchmark = self.plan.benchmark
        names = [self.name, benchmark.longer, f"{self.name}-{self.key[:8]}"]
        known = {name: read_result(self.folder / f"{name}.json") for name in names if name}
        first = known[self.name]
        if first is not None and first.facts.get("place") == benchmark.place:  # the same data, measured otherwise
            known.pop(benchmark.longer, None)
        same = (name for name, each in known.items() if each is not None and each.key == self.key)
        free = (name for name, each in known.items() if each is None)
        new = self.name if self.request.options.overwrite else next(free, names[-1])
        return self.folder / f"{next(same, new)}.json"

    def result(self) -> Result:
        """The result on disk if it has the same key, else a new one, which is written."""
        encoder, options = self.encoder, self.request.options
        known = read_result(self.path())
        if known is not None and known.key == self.key and not options.overwrite:
            return known
        started = time.time()
        _read_as_taken(encoder, self.plan, self.request)
        own, baselines = self.rows("", lambda: encoder), {}
        if options.baselines:
            baselines = {role: self.rows(role, make) for role, make in baselines_of(encoder, options.seed).items()}
        own, variants = compared(own, baselines), {data.variant for _, data in self.plan.tasks}
        path, benchmark = self.path(), self.plan.benchmark  # of several that began together, the others may be done
        facts = {
            "title": f"{benchmark.title} ({self.key[:8]})" if path.stem.endswith(self.key[:8]) else benchmark.title,
            "place": benchmark.place,
            "task": benchmark.task,
            "split": variants.pop() if len(variants) == 1 else "",
            "weights": {"name": encoder.name, "identity": encoder.identity},
            "precision": str(encoder.dtype).removeprefix("torch."),
            "image_size": self.image_size,
            "seed": options.seed,
            "published": [
                dataclasses.asdict(number)
                | {"metric": number.metric or task.metric, "protocol": PROTOCOLS[task.protocol][1]}
                for task, _ in self.plan.tasks
                for number in task.published
            ],
            "warnings": [*self.plan.warnings, *doubts(own, baselines, [data for _, data in self.plan.tasks])],
            "seconds": time.time() - started,
            "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        }
        result = Result(path.stem, self.key, own, baselines, facts)
        write_atomic(path, json.dumps(result.as_dict(), indent=1) + "\n")
        drawn, shown = self.unfinished / "examples", self.folder / "examples" / path.stem
        if options.examples:  # those of this measurement take the place of those that the name had before
            shutil.rmtree(shown, ignore_errors=True)
        if drawn.is_dir():
            shown.parent.mkdir(parents=True, exist_ok=True)
            drawn.rename(shown)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        with suppress(OSError):  # another dataset is not finished
            self.unfinished.parent.rmdir()
        return result

    def rows(self, role: str, make: Callable[[], Encoder]) -> tuple[Row, ...]:
        """The rows of every task in one role, "" for the encoder itself; what was finished before is not done again.

        make  gives the encoder: called when a task first needs it, once for all of them
        """
        encoder = functools.cache(make)
        found: dict[str, list[Row]] = {}
        # The grid first: what it extracts serves the others.
        for task, data in sorted(self.plan.tasks, key=lambda each: each[0].protocol != "linear"):
            name = "-".join([task.protocol, *role.split()])
            path = self.unfinished / f"{name}.json"
            finished = {} if self.request.options.overwrite else read_json(path)
            if finished.get("key") == self.key:
                found[task.protocol] = [Row.from_dict(row) for row in finished["rows"]]
                continue
            evaluate = pkgutil.resolve_name(PROTOCOLS[task.protocol][0])
            options = _effective(self.request, task, data, self.image_size)
            try:
                rows = evaluate(Measurement(encoder(), data, task, options, self.context(name, role)))
            except (UserError, RunError) as error:
                raise type(error)(f"{self.name}, {task.protocol}: {error}") from error
            # Results of equal ones have the same resamples.
            tested = _digest([_stamped(task, data), _own_options(self.plan, self.request), self.request.options.seed])
            rows = [dataclasses.replace(row, tested=tested) for row in rows]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({"key": self.key, "rows": [row.as_dict() for row in rows]}))
            found[task.protocol] = rows
        return tuple(row for task, _ in self.plan.tasks for row in found[task.protocol])

    def context(self, name: str, role: str) -> Context:
        """The context of one task; `name` is that of its files, `role` as for `rows`."""
        options = self.request.options

        return Context(
            features=Path(options.features) if options.features else self.folder.parent / "features",
            # With the key in its name, a state is never resumed with other weights or options.
            state=self.unfinished / name,
            examples=self.unfinished / "examples" if options.examples and not role else None,
            seed=options.seed,
            image_size=self.image_size,
            preprocessing=self.encoder.preprocessing,
            batch_size=options.batch_size,
            workers=default_workers() if options.workers is None else options.workers,
            num_examples=options.examples,
            features_dtype=options.features_dtype,
            progress=lambda items, total, what: show_progress(items, total, f"{self.name} · {what}"),
        )


def _effective(request: Request, task: Task, data: Data, side: int) -> EvalOptions:
    """The options with those that the dataset sets for its protocol, except where the user said otherwise.

    side  of the encoder's square crops in pixels
    """
    set_by_data, section = {**task.options, **data.options(side)}, getattr(request.options, task.protocol)
    free = {key for key in vars(section) if f"{task.protocol}.{key}" not in request.explicit}
    own = {key: value for key, value in set_by_data.items() if key in free}  # what data say may concern other protocols
    section = dataclasses.replace(section, **own)
    return dataclasses.replace(request.options, **{task.protocol: section})


def _key(encoder: Encoder, plan: Planned, request: Request, side: int) -> str:
    """16 hexadecimal digits over all that shapes a result: weights, images, ground truth, options."""
    shaping = {key.partition(".")[0] for key in flat(request.options, shaping=True)}
    values = {key: value for key, value in dataclasses.asdict(request.options).items() if key in shaping}
    data = [(*_stamped(task, found), found.options(side)) for task, found in plan.tasks]
    seen = [encoder.identity, encoder.preprocessing.value_range, str(encoder.dtype)]
    return _digest([*seen, values, data, _own_options(plan, request)])


def _own_options(plan: Planned, request: Request) -> dict[str, Any]:
    return dict(request.dataset.get(plan.benchmark.name, {}))


def _stamped(task: Task, data: Data) -> list[Any]:
    """What identifies the images of a task and their truth."""
    return [
        (task.protocol, task.metric, dict(task.options), data.variant, name)
        + (len(split), split.source.stamp(), split.truth_stamp())
        for name, split in data.splits.items()
    ]


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(plain(values), sort_keys=True).encode()).hexdigest()[:16]


def baselines_of(encoder: Encoder, seed: int) -> dict[str, Callable[[], Encoder]]:
    """What every encoder stands beside, by role: random weights of its architecture, and the pixels that it sees."""

    def pixels() -> Encoder:
        found = PixelEncoder(encoder.patch_size, encoder.image_size, encoder.in_channels, device=encoder.device)
        own = found.preprocessing
        found.preprocessing = replace(encoder.preprocessing, mean=own.mean, std=own.std)
        return found

    return {"random init": lambda: encoder.random_init(seed), "raw pixels": pixels}


def watched_images(encoder: Encoder, plan: Planned) -> list[str]:
    """A warning where the probe inside the encoder's run has looked at images that are tested here, by their contents.

    Of more than MOST_COMPARED images, that many are looked at.
    """
    if (watched := encoder.watched) is None:
        return []
    tested = {
        split.source.stamp(): split for _, data in plan.tasks for name, split in data.splits.items() if name != "train"
    }
    places = [
        (split.source, split.image(index))
        for split in tested.values()
        for index in np.unique(np.linspace(0, len(split) - 1, min(len(split), MOST_COMPARED)).astype(int)).tolist()
    ]

    def is_watched(number: int) -> bool:
        source, index = places[number]
        try:
            return content_digest(source.read(index)).hex()[:16] in watched.images
        except (BadImage, OSError):
            return False

    count = sum(parallel(is_watched, range(len(places))))
    known = f"{count:,} of {len(places):,} tested images were looked at by the probe inside the run ({watched.data})"
    if watched.chosen:
        found = f"chosen on tested images: {known}, and its step was chosen by them: the figures are too high"
    else:
        found = f"watched while training: {known}; who was guided by its curve has seen the test"
    return [found] if count else []


def check_channels(encoder: Encoder, plan: Planned) -> list[str]:
    """Warnings on how an encoder of other than three channels sees the RGB pictures of a benchmark.

    raises  UserError where it cannot: with one channel it sees grey, with any other number nothing is meant
    """
    sources = (split.source for _, data in plan.tasks for split in data.splits.values())
    if encoder.in_channels == 3 or all(source.as_trained for source in sources):
        return []
    if encoder.in_channels == 1:
        return [f"{plan.benchmark.name}: {encoder.name} has one channel and sees its pictures in grey"]
    what = f"its pictures are RGB, and {encoder.name} takes {encoder.in_channels} channels"
    raise UserError(f"{plan.benchmark.name}: {what}; expected a model of 3, or of 1, which sees them in grey")


def check_size(encoder: Encoder, options: EvalOptions) -> None:
    """UserError unless the option `image_size`, in pixels, is a multiple of the encoder's patch size."""
    size, patch = options.image_size, encoder.patch_size
    if size is not None:
        expected = f"a multiple of the patch size {patch}, for example {max(size // patch, 1) * patch}"
        check(size % patch == 0, "image_size", size, expected)
