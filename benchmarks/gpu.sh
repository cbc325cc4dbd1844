#!/usr/bin/env bash
# All that a machine with a GPU can say about this code, in under ten minutes, into one JSON file:
#
#   benchmarks/gpu.sh [OUT.json]            default: gpu.json
#   benchmarks/gpu.sh --short [OUT.json]    the smallest form, to see that it works; its figures mean nothing
#
# The tests that need a GPU; the step alone of ViT-S/16, B/16 and L/16 under each attention (L/16 compiled, too), and with
# files and augmentation; memory against the plan. PYTHON is the environment's python, PEER_PYTHON one that has lightly-train.
# A part that fails is named in the file, and the others go on. SECONDS_OF_A_PART (40) is when a part's last round begins.
set -uo pipefail
cd "$(dirname "$0")/.."
short=()
if [[ "${1:-}" == --short ]]; then short=(--short); shift; fi
out="$(realpath -m "${1:-gpu.json}")"
python="${PYTHON:-python}"
budget="${SECONDS_OF_A_PART:-40}"
parts="$(mktemp -d)"
trap 'rm -rf "$parts"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# part NAME COMMAND…: the last line that the command prints is its JSON.
part() {
  local name="$1"
  shift
  printf '\n== %s (%s s)\n' "$name" "$SECONDS"
  "$@" 2>"$parts/errors" | tee "$parts/printed"
  local code="${PIPESTATUS[0]}"
  tail -n 5 "$parts/errors" >&2
  "$python" - "$name" "$code" "$parts" <<'END'
import json, pathlib, sys
name, code, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
printed, errors = (folder.joinpath(file).read_text().splitlines() for file in ("printed", "errors"))
try:
    figures = json.loads(printed[-1])
except (IndexError, ValueError):
    figures = {"printed": printed[-3:]}
line = {"part": name, "exit code": code, **figures, **({"errors": errors[-5:]} if code else {})}
folder.joinpath("lines").open("a").write(json.dumps(line) + "\n")
END
}

mapfile -t files < <(grep -l "mark.gpu" tests/*.py)  # collecting all tests takes a minute
part "tests that need a GPU" "$python" -m pytest -q -m gpu -n 0 -p no:cacheprovider "${files[@]}"

for model in "vits16_reg4 128" "vitb16_reg4 96" "vitl16_reg4 64"; do
  read -r name size <<<"$model"
  asked=(--model "$name" --batch-size "$size" --precision bf16 --drop-path 0.3 --steps 5 --rounds 3 --budget "$budget")
  every=("dinoreg, xformers" "dinoreg, varlen" "dinoreg, sdpa")
  # Compiling takes longer than all else: once.
  [[ "${#short[@]}" == 0 && "$name" == vitl16_reg4 ]] && every+=("dinoreg, compiled")
  if [[ -n "${PEER_PYTHON:-}" && "$name" == vits16_reg4 ]]; then
    peer=(--peer lightly-train --peer-python "$PEER_PYTHON" --only "${every[@]}" "lightly-train, bf16, malloc, drop path 0.3")
  else
    peer=(--only "${every[@]}")
  fi
  part "step, $name" "$python" benchmarks/step.py "${short[@]}" "${asked[@]}" "${peer[@]}"
  part "end to end, $name" "$python" benchmarks/end_to_end.py "${short[@]}" --model "$name" --batch-size "$size" \
    --only "as asked" --steps 5 --rounds 2 --budget "$budget"
done
part "memory" "$python" benchmarks/memory.py "${short[@]}" --models vits14_reg4 vitl16_short_reg4_in1k --batch-size 64

"$python" - "$parts/lines" "$out" <<'END'
import json, pathlib, sys
lines = [json.loads(line) for line in pathlib.Path(sys.argv[1]).read_text().splitlines()]
pathlib.Path(sys.argv[2]).write_text(json.dumps({"parts": lines}, indent=1) + "\n")
failed = [line["part"] for line in lines if line["exit code"]]
print(f"\n{sys.argv[2]}: {len(lines)} parts" + (f"; failed: {', '.join(failed)}" if failed else ""))
END
