#!/usr/bin/env bash
# Checks Tidemill on a machine with an NVIDIA GPU, and measures it there. `--help` says how.
# shellcheck disable=SC2317 # Parts are called by their names.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
programs=$here/gpu-check

# Seconds of all parts together.
readonly TOGETHER_S=570

usage() {
  cat <<EOF
usage: scripts/gpu-check.sh [--only PART,…] [--from FOLDER] [--results FOLDER] [--gpu N] [--python PROGRAM]
       scripts/gpu-check.sh --dry-run [--only PART,…]
       scripts/gpu-check.sh --pack [FOLDER]

Checks Tidemill on a real GPU in less than ten minutes, and measures it beside what limits it. There it takes this checkout, the carried
programs, an NVIDIA driver and python3 with torch and transformers; no Rust and no network.

  1. Where Rust is:         scripts/gpu-check.sh --pack        builds the programs into carried/gpu-check (git ignores it)
  2. Carry the checkout and carried/ to the machine with the GPU.
  3. There:                 scripts/gpu-check.sh               all parts, the table, and benches/results/gpu.jsonl

Parts, in this order; each has a limit of its own in seconds, all together have $TOGETHER_S, and one that fails does not keep others from
running:
$(for part in "${parts[@]}"; do printf '  %-10s %4s  %s\n' "$part" "${limit[$part]}" "${what[$part]}"; done)

  --only PART,…      these parts alone
  --from FOLDER      the carried programs [default: carried/gpu-check, and for --dry-run what cargo has built]
  --results FOLDER   where logs and results go [default: a new folder under /tmp]
  --gpu N            which GPU, as the driver counts [default: 0]
  --python PROGRAM   a Python that has torch and transformers [default: python3]
  --dry-run          needs no GPU: what can run on the emulated GPU and on the CPU runs, and the rest is shown
  --pack [FOLDER]    only builds what is to be carried: at most 64 MiB

Exit status: 0 all is well; 1 a part failed; 2 wrong use; 3 no GPU that is of use; 4 a carried program is missing.
EOF
}

parts=(machine kernels torch models parity split ranks overlap sanitizer limits speed peers start)
declare -A what=(
  [machine]="what GPU, driver and libraries there are"
  [kernels]="each kernel beside its reference, on the GPU"
  [torch]="what kernels computed, computed again by torch in f64"
  [models]="small models beside goldens of transformers, engines and handoffs, on the GPU"
  [parity]="models with random weights, made here, beside transformers"
  [split]="two processes, GPU and CPU in every combination, answer as one does"
  [ranks]="two ranks, each on a GPU of its own, answer as one GPU does, and hand over to one and from one; where there are two GPUs"
  [overlap]="the next step asked for while one computes, beside steps that are waited for"
  [sanitizer]="kernels under compute-sanitizer, where it is installed"
  [limits]="by torch: bandwidth of memory, rate of a product of 8192³, attention"
  [speed]="decode and prefill at the shape of Llama 3 8B, single kernels, graphs beside launches"
  [peers]="the same model by transformers: eager, compiled, with flash attention"
  [start]="from the start to the first token, without compiled kernels on disk"
)
declare -A limit=(
  [machine]=30 [kernels]=60 [torch]=60 [models]=60 [parity]=90 [split]=60 [ranks]=60 [overlap]=40 [sanitizer]=60 [limits]=40 [speed]=150 [peers]=230 [start]=40
)

die() { # STATUS TEXT
  echo "gpu-check: $2" >&2
  exit "$1"
}

only=""
from=""
results=""
gpu=0
python=python3
dry=""
pack=""
while [ $# -gt 0 ]; do
  case $1 in
    --only | --from | --results | --gpu | --python) [ $# -ge 2 ] || die 2 "$1 takes a value; see --help" ;;&
    --only) only=$2 && shift 2 ;;
    --from) from=$2 && shift 2 ;;
    --results) results=$2 && shift 2 ;;
    --gpu) gpu=$2 && shift 2 ;;
    --python) python=$2 && shift 2 ;;
    --dry-run) dry=1 && shift ;;
    --pack)
      pack=$root/carried/gpu-check && shift
      if [ $# -gt 0 ]; then pack=$1 && shift; fi
      ;;
    --help | -h) usage && exit 0 ;;
    *) die 2 "\`$1\` is no flag; see --help" ;;
  esac
done
case $gpu in '' | *[!0-9]*) die 2 "--gpu takes the number of a GPU, not \`$gpu\`" ;; esac
chosen=("${parts[@]}")
if [ -n "$only" ]; then
  IFS=, read -r -a chosen <<<"$only"
  for part in "${chosen[@]}"; do
    [ -n "${what[$part]-}" ] || die 2 "\`$part\` is no part; there are ${parts[*]}"
  done
fi

# The programs: what they are called here, and the test that each of them is.
programs_of=(tidemill kernels-cuda engine-models engine-serving)
tests=(--package tidemill-kernels --package tidemill-engine --test cuda --test models --test serving)

# Says where cargo puts the programs, building what is not there: NAME PATH, line by line.
built() { # [CARGO FLAG…] for the tests
  cargo test --quiet --no-run --message-format=json "$@" | "$python" "$programs/built.py"
}

if [ -n "$pack" ]; then
  mkdir -p "$pack" || die 1 "$pack cannot be made"
  cargo build --release --package tidemill || die 1 "tidemill does not build"
  # Kernels and engine are optimised in this profile too (Cargo.toml), and it builds faster.
  list=$(built "${tests[@]}") || die 1 "the tests do not build"
  while read -r name path; do
    [ "$name" = tidemill ] || strip -o "$pack/$name" "$path" || die 1 "$path cannot be stripped"
  done <<<"$list"
  strip -o "$pack/tidemill" "${CARGO_TARGET_DIR:-$root/target}/release/tidemill" || die 1 "tidemill cannot be stripped"
  (cd "$root" && git describe --always --dirty --abbrev=7 2>/dev/null || echo unknown) >"$pack/commit"
  for name in "${programs_of[@]}"; do [ -x "$pack/$name" ] || die 1 "$name was not built"; done
  kib=$(du -sk "$pack" | cut -f1)
  [ "$kib" -le $((64 * 1024)) ] || die 1 "$pack has $kib KiB, more than the 65536 that can be carried"
  echo "$pack: $((kib / 1024)) MiB; carry it with the checkout and run scripts/gpu-check.sh there"
  exit 0
fi

# Where the programs are.
declare -A program=()
find_programs() {
  if [ -z "$from" ] && [ -n "$dry" ]; then
    local list
    # What `cargo test --workspace` has built, which is all there in CI.
    list=$(cd "$root" && built --workspace) || die 4 "the tests do not build"
    while read -r name path; do program[$name]=$path; done <<<"$list"
  else
    from=${from:-$root/carried/gpu-check}
    for name in "${programs_of[@]}"; do program[$name]=$from/$name; done
  fi
  for name in "${programs_of[@]}"; do
    [ -x "${program[$name]-}" ] || die 4 "no program $name in ${from:-target}: scripts/gpu-check.sh --pack makes it, where Rust is"
  done
}
find_programs

# Libraries of CUDA as pip and the system lay them out: NVRTC and cuBLASLt are found at run time.
libraries=$("$python" - <<'EOF' 2>/dev/null
import glob
try:
    import nvidia
    print(":".join(sorted(path for root in nvidia.__path__ for path in glob.glob(root + "/*/lib"))))
except ImportError:
    pass
EOF
)
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}${libraries:+$libraries:}/usr/local/cuda/lib64:/usr/local/nvidia/lib64

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
results=${results:-$(mktemp -d /tmp/gpu-check.XXXXXX)}
mkdir -p "$results" || die 2 "$results cannot be made"
results=$(cd "$results" && pwd)
rm -f "$results"/*.jsonl

# Sets what tests and servers compute on.
device=cuda:$gpu
if [ -n "$dry" ]; then
  device=cpu
else
  # Before anything else, and loudly: nothing of what follows means anything without one.
  "${program[tidemill]}" doctor >"$results/doctor.log" 2>&1
  reason=$("${program[tidemill]}" bench model --shape llama-tiny --device "$device" --prefill-len 16 --decode-batch 1 --runs 1 --json 2>&1 >/dev/null)
  # shellcheck disable=SC2181
  [ $? = 0 ] || { cat "$results/doctor.log" >&2 && die 3 "NO GPU that is of use: $reason"; }
fi
on_gpu=()
[ -n "$dry" ] || on_gpu=(env "TIDEMILL_TEST_GPU=$gpu")
# Goldens and fixtures are those of this checkout.
export CARGO_MANIFEST_DIR=$root/engine PYTHONPATH=$programs PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
has_torch=""
"$python" -c 'import torch, transformers' 2>/dev/null && has_torch=1

# Says that something is not done here, and why.
skip() { # TEXT
  echo "skipped: $1"
  return 100
}

# The same for want of torch, without which a check of a GPU is not whole.
without_torch() { # TEXT
  [ -n "$dry" ] || { echo "$python has no torch with transformers; --python names another" && return 1; }
  skip "$python has no torch with transformers: would $1"
}

part_machine() {
  if [ -z "$dry" ]; then
    nvidia-smi || echo "no nvidia-smi"
    cat "$results/doctor.log"
  else
    "${program[tidemill]}" doctor
  fi
  [ -n "$has_torch" ] || { without_torch "say which"; return; }
  "$python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__, "CUDA", torch.version.cuda)'
}

part_kernels() {
  # In a dry run a few: CI runs all of them anyway.
  local names=()
  [ -z "$dry" ] || names=(rows::rms_norm rows::silu_mul product::few_rows)
  "${on_gpu[@]}" "${program[kernels-cuda]}" "${names[@]}"
}

part_torch() {
  local folder=$scratch/exchange
  mkdir -p "$folder"
  [ -n "$dry" ] || export TIDEMILL_EXCHANGE_LARGE=1
  TIDEMILL_EXCHANGE=$folder "${on_gpu[@]}" "${program[kernels-cuda]}" --ignored --exact agreement::exchange::written_for_others || return 1
  [ -n "$has_torch" ] || { without_torch "compare $(wc -l <"$folder/cases.jsonl") cases"; return; }
  "$python" "$programs/exchange.py" "$folder" --device "$device"
}

part_models() {
  local names=(cuda::)
  [ -z "$dry" ] || names=(cuda::logits_and_tokens_are_those_of_transformers_and_of_the_sampler::llama3)
  "${on_gpu[@]}" "${program[engine-models]}" "${names[@]}" || return 1
  [ -z "$dry" ] || names=(cuda::split_between_kinds_of_devices_equals_whole)
  # Each engine has threads of its own.
  "${on_gpu[@]}" "${program[engine-serving]}" --test-threads 2 "${names[@]}"
}

part_parity() {
  [ -n "$has_torch" ] || { without_torch "make models and compare tokens and log-probabilities"; return; }
  "$python" "$programs/parity.py" --tidemill "${program[tidemill]}" --device "$device" --scratch "$scratch/parity" ${dry:+--quick}
}

part_split() {
  "$python" "$programs/split.py" --tidemill "${program[tidemill]}" --device "$device" --models "$root/tests/fixtures/models" ${dry:+--quick}
}

part_ranks() {
  if [ -n "$dry" ]; then
    # Two devices that are not there.
    "${program[engine-serving]}" cuda_ranks::the_host_waits_for_the_first_rank_once_a_step || return 1
  else
    local count
    count=$(grep -o multiprocessors "$results/doctor.log" | wc -l)
    [ "$count" -gt $((gpu + 1)) ] || { skip "two GPUs from number $gpu on are needed, and there are $count in all: two ranks did NOT run"; return; }
  fi
  "$python" "$programs/ranks.py" --tidemill "${program[tidemill]}" --device "$device" --models "$root/tests/fixtures/models" ${dry:+--quick}
}

part_overlap() {
  "$python" "$programs/overlap.py" --tidemill "${program[tidemill]}" --device "$device" --model "$root/tests/fixtures/models/llama3" \
    --out "$results/overlap.json"
}

part_sanitizer() {
  local sanitizer=""
  sanitizer=$(command -v compute-sanitizer) || sanitizer=$(ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  [ -z "$dry" ] || { skip "no GPU: would run memcheck and racecheck over the kernel tests"; return; }
  [ -n "$sanitizer" ] || { skip "compute-sanitizer is not installed"; return; }
  local tool
  for tool in memcheck racecheck; do
    # The smaller tests of each kind: a sanitizer is some hundred times slower.
    "${on_gpu[@]}" "$sanitizer" --tool "$tool" --error-exitcode 9 "${program[kernels-cuda]}" --test-threads 1 \
      rows:: rotary:: convert::zero_tail attention::splits_and_windows sampling:: digest:: || return 1
  done
}

part_limits() {
  [ -n "$has_torch" ] || { without_torch "measure copies, a product of 8192³ and attention"; return; }
  "$python" "$programs/limits.py" --device "$device" --out "$results/limits.json"
}

bench() { # NAME FLAG…
  local name=$1
  shift
  "${program[tidemill]}" bench "$@" --json >"$results/$name.json" || { cat "$results/$name.json" && return 1; }
}

part_speed() {
  local shape=(--shape llama-3-8b --device "$device" --runs 5) failed=0
  if [ -n "$dry" ]; then
    echo "would run: tidemill bench model --shape llama-3-8b --device cuda:$gpu …, and with --enforce-eager, and tidemill bench kernels"
    bench graph model --shape llama-tiny --device cpu --runs 1 --prefill-len 32 --decode-batch 1 --decode-context 16 || failed=1
  else
    bench graph model "${shape[@]}" --prefill-len 2048,8192 --decode-batch 1,64,256 --decode-context 1024 --max-num-batched-tokens 8192 || failed=1
    bench eager model "${shape[@]}" --prefill-len 128 --decode-batch 1 --decode-context 1024 --enforce-eager || failed=1
    bench kernels kernels --device "$device" --runs 5 || failed=1
  fi
  return "$failed"
}

part_peers() {
  [ -n "$has_torch" ] || { without_torch "measure the same model"; return; }
  [ -z "$dry" ] || { "$python" "$programs/peers.py" --device cpu --tiny --out "$results/peers.json" && return; }
  "$python" "$programs/peers.py" --device "$device" --out "$results/peers.json"
}

part_start() {
  # A fixture, whose weights are read in no time: what is left is the start itself.
  "$python" "$programs/start.py" --tidemill "${program[tidemill]}" --device "$device" --model "$root/tests/fixtures/models/llama3" \
    --out "$results/start.json"
}

declare -A outcome=()
worst=0
for part in "${chosen[@]}"; do
  # All of them together have ten minutes, of which some seconds are the report's.
  left=$((TOGETHER_S - SECONDS))
  if [ "$left" -lt 5 ]; then
    outcome[$part]="NO TIME LEFT" && worst=1
    continue
  fi
  [ "$left" -ge "${limit[$part]}" ] || limit[$part]=$left
  printf '\n=== %s: %s (at most %s s)\n' "$part" "${what[$part]}" "${limit[$part]}"
  began=$SECONDS
  # In a process group of its own, which ends as a whole with its time.
  (
    set -m
    "part_$part" >"$results/$part.log" 2>&1 &
    child=$!
    (
      sleep "${limit[$part]}"
      kill -TERM -- "-$child" 2>/dev/null && echo "gpu-check: its time is over" >>"$results/$part.log"
      sleep 5
      kill -KILL -- "-$child" 2>/dev/null
    ) >/dev/null 2>&1 &
    watch=$!
    wait "$child"
    status=$?
    kill -TERM -- "-$watch" 2>/dev/null
    exit $status
  )
  status=$?
  tail -n 25 "$results/$part.log"
  case $status in
    0) outcome[$part]="good" ;;
    100) outcome[$part]="skipped" ;;
    143 | 137) outcome[$part]="OUT OF TIME" && worst=1 ;;
    *) outcome[$part]="FAILED ($status)" && worst=1 ;;
  esac
  outcome[$part]="${outcome[$part]}, $((SECONDS - began)) s"
done

printf '\n=== what came of it\n'
"$python" "$programs/report.py" --results "$results" ${dry:+--dry-run} --commit "$(cat "$from/commit" 2>/dev/null || echo unknown)" \
  --append "$root/benches/results/gpu.jsonl" || worst=1
printf '\n'
for part in "${chosen[@]}"; do printf '%-10s %s\n' "$part" "${outcome[$part]}"; done
echo "logs and numbers: $results"
exit $worst
