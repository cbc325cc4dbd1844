"""`dinoreg curate` and `dinoreg.curate`: a set of images without copies, its clusters evened, by `embed`'s features.

Near-duplicates are groups of images that a chain of cosines above a threshold joins; each is sought among the images of
its own and the next cluster, where nearly all lie: the time grows with n^2 / clusters. Clusters are k-means's; an image
of a cluster of n is drawn with a weight of n^-balance (with balance 1 every cluster as often as any other, as in Vo et
al. 2024, "Automatic data curation for self-supervised learning", arXiv 2405.15613, who cluster hierarchically).
The features are in memory once.
"""

import csv
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.checkpoint.atomic import replacing
from dinoreg.commands.options import CurateOptions
from dinoreg.data.display import as_rgb
from dinoreg.data.open import WEIGHT, open_names
from dinoreg.data.source import Source
from dinoreg.data.value_range import BadImage
from dinoreg.export.feature_file import SUFFIXES, read_rows
from dinoreg.reports.html import Picture, WithPage
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import RunError, UserError, reworded
from dinoreg.runtime.guide import next_lines
from dinoreg.runtime.places import is_url
from dinoreg.runtime.printable import print_status
from dinoreg.visualize.gallery import Gallery, sheet, tile

LIST, COPIES = "curated.csv", "copies.csv"
NEIGHBOURS = 8  # of each image that are looked at; longer chains join larger groups
MOST_CLUSTERS = 1000  # unless `clusters` says otherwise
ROWS, TILES, SIDE = 12, 8, 88  # of a sheet of pictures: groups, images of each, pixels


@dataclass(frozen=True, repr=False)
class Curation(WithPage):
    """What `dinoreg.curate` wrote: the `list` that `data=` takes, with `data.root`, and the numbers of its `page`.

    record  images, kept, copies, groups of copies, the largest of these, and of each cluster (images that are
            kept, their share, the share of the draws)
    """

    list: Path
    root: str
    record: dict[str, Any]


def curate(features: str | Path, out: str | Path, **options: Any) -> Curation:
    """Curate images by their features; the same as `dinoreg curate features=… out=… key=value …`.

    features  the file that `embed` wrote, with one row an image
    out       folder of the list, the table of copies and the page
    options   the command line's keys: threshold=0.95, clusters=0, balance=0.5, root=None, seed=0. Images at URLs are
              only opened, for the page, where `root` names what they lie below
    raises    UserError (a ValueError) for wrong options or features, before anything is written
    """
    given, gallery = CurateOptions(str(features), str(out), **options), Gallery("curation", Path(out), {})
    path = Path(given.features)
    if path.suffix not in SUFFIXES or not path.is_file():
        raise UserError(f"features={path}: expected a file that embed wrote, {' or '.join(SUFFIXES)}")
    with reworded(f"features={path}: is no whole file of features", Exception):
        values, names = read_rows(path)
        values = values.astype(np.float32)
    if values.ndim != 2 or len(values) < 2:
        raise UserError(f"features={path}: rows of {values.shape}, expected one of an image, of two or more images")
    if not np.abs(values).max() < 1e15 or len(names) != len(values) or not all(names):
        raise UserError(f"features={path}: expected finite numbers, and a name for each of the {len(values):,} rows")
    values -= values.mean(axis=0)  # what all images share says nothing of two of them
    values /= np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12)
    source, root, entries = open_names(names, given.root)
    nearest = _clusters(values, given)
    clusters, first = nearest[:, 0], _first_copies(values, nearest, given.threshold)  # (n,)
    kept, groups = first == np.arange(len(first)), np.bincount(first)
    sizes = np.bincount(clusters[kept], minlength=clusters.max() + 1)
    weights = sizes.clip(1) ** -given.balance
    weights *= kept.sum() / (weights @ sizes)  # 1 on average
    with reworded(f"out={out}: cannot be written", OSError, into=RunError):
        gallery.folder.mkdir(parents=True, exist_ok=True)
        rows, copies = np.flatnonzero(kept), np.flatnonzero(~kept)
        listed = ((entries[row], f"{weights[clusters[row]]:.6g}", clusters[row]) for row in rows)
        _write(gallery.out / LIST, ("path", WEIGHT, "cluster"), listed)
        _write(gallery.out / COPIES, ("path", "copy_of"), ((entries[row], entries[first[row]]) for row in copies))
    order = [each for each in np.argsort(sizes, kind="stable").tolist() if sizes[each]]
    drawn = weights * sizes / len(rows)
    record = {
        "images": len(names),
        "kept": len(rows),
        "copies": len(copies),
        "groups": int((groups > 1).sum()),
        "largest": int(groups.max()),
        "clusters": [(int(sizes[each]), sizes[each] / len(rows), drawn[each]) for each in order],
        **{key: getattr(given, key) for key in ("threshold", "balance", "seed")},
    }
    largest = [row for row in np.argsort(-groups, kind="stable")[:ROWS] if groups[row] > 1]
    ends = {"rare": order[:ROWS], "common": order[: -ROWS - 1 : -1]}
    pictured = {"same": [np.flatnonzero(first == row) for row in largest]}
    pictured |= {end: [np.flatnonzero(kept & (clusters == each)) for each in some] for end, some in ends.items()}
    drawings = {stem: _sheet(gallery, stem, source, each) for stem, each in pictured.items()}
    page = gallery.write_page(f"Curation of {path.name}", record, "commands", **record, **drawings)
    return Curation(page, gallery.out / LIST, root, record)


def curate_command(options: CurateOptions) -> None:
    """Run `dinoreg curate`: write the list and the page, and print what to do with them."""
    found = curate(**vars(options))
    kept, images, copies, groups = (found.record[key] for key in ("kept", "images", "copies", "groups"))
    print(f"list: {found.list}, {kept:,} of {images:,} images; {copies:,} copies of {groups:,} pictures are left out")
    print(f"page: {found.page}")
    if is_url(found.root) and options.root is None:
        print_status(f"the page shows no images, as these are at a URL, which you name: root={found.root}")
    print_status(*next_lines("curated", {"data": found.list, "root": found.root}))


def _clusters(values: np.ndarray, options: CurateOptions) -> np.ndarray:
    """The nearest and the next cluster of each row, (n, 2); (n, 1) where there is but one."""
    with reworded(f"curate needs scikit-learn: {install('scikit-learn')}", ImportError):
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.neighbors import NearestNeighbors
    number = options.clusters or min(max(2, round(len(values) ** 0.5)), MOST_CLUSTERS)
    if number > len(values):
        raise UserError(f"clusters={number}: more than the {len(values):,} images")
    means = MiniBatchKMeans(number, random_state=options.seed, batch_size=max(4096, 4 * number), n_init=3).fit(values)
    search = NearestNeighbors(n_neighbors=min(2, number), algorithm="brute").fit(means.cluster_centers_)
    return np.asarray(search.kneighbors(values, return_distance=False))


def _first_copies(values: np.ndarray, nearest: np.ndarray, threshold: float) -> np.ndarray:
    """The first image (n,) of the group of near-duplicates that each belongs to: itself where it has none before it."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from sklearn.neighbors import NearestNeighbors

    edges = [np.zeros((0, 2), dtype=np.int64)]
    for cluster in range(int(nearest.max()) + 1):
        rows = np.flatnonzero((nearest == cluster).any(axis=1))
        if len(rows) > 1:
            search = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(rows)), algorithm="brute").fit(values[rows])
            distances, found = search.kneighbors(values[rows])
            near, place = np.nonzero(distances**2 <= 2 * (1 - threshold) + 1e-6)  # of unit vectors
            edges.append(np.stack([rows[near], rows[found[near, place]]], axis=1))
    one, other = np.concatenate(edges).T
    graph = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(len(values),) * 2)
    groups = connected_components(graph, directed=False)[1]
    return np.unique(groups, return_index=True)[1][groups]


def _write(path: Path, head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def _sheet(gallery: Gallery, stem: str, source: Source | None, groups: list[np.ndarray]) -> Picture | None:
    """Some images of each group in a row, with their number; None where none can be read."""
    if source is None:
        return None
    rows, names = [], []
    for group in groups:
        tiles = []
        for index in group[:TILES].tolist():
            with suppress(BadImage):
                tiles.append(tile(as_rgb(source.decode(index).permute(1, 2, 0).numpy()), SIDE))
        if tiles:
            rows.append(tiles)
            names.append(f"{len(group):,}")
    return gallery.picture(stem, sheet(rows, names=names), f"{stem} images, a group a row") if rows else None
