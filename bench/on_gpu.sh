#!/usr/bin/env bash
# All that needs a GPU, in one call of less than nine minutes: builds in place, tests on the device, tunes how kernels
# are launched, times operators and models, and leaves what it found in one folder, of a few files.
#
#   bench/on_gpu.sh [--device cpu] [--commit NAME] [--dry-run] [FOLDER [STEP...]]
#
# FOLDER    where results go: <device>.json, which belongs into bench/results/, with its plot; tests.xml; log.txt;
#           launch_tables.tar.gz, the kernels/*.json that were tuned (default: build/on_gpu)
# STEP      of those below (default: all but tune-more, for nine minutes, and compiled-operators and compiled-models, the
#           same benches again with torch.compile among the peers, which take most of a call each)
# PYTHON    in the environment: what runs it (default: python3). It needs torch, Triton, transformers, pytest and
#           pybind11; nothing is fetched.
#
# A step that fails or outlasts its limit stops no later one; the exit status counts those that did.
set -uo pipefail

device=cuda commit="" dry_run=""
while [[ "${1:-}" == --* ]]; do
    case "$1" in
        --device) device=$2; shift 2 ;;
        --commit) commit=$2; shift 2 ;;
        --dry-run) dry_run=1; shift ;;
        *) echo "on_gpu.sh: there is no option $1" >&2; exit 2 ;;
    esac
done
cd "$(dirname "$0")/.." || exit 2
folder=${1:-build/on_gpu}
shift $(($# > 0))
chosen=("$@")
((${#chosen[@]})) || chosen=(build tests tune overhead operators models)
python=${PYTHON:-python3}
mkdir -p "$folder"
rm -f "$folder/tests.xml"  # of an earlier call
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
{ read -r results && read -r architecture; } < <("$python" -m vlcore.bench.record --begin "$folder" --device "$device")
[[ $results ]] || exit 2

group=""
trap '[[ $group ]] && kill -KILL -- "-$group" 2>/dev/null; exit 130' INT TERM
failed=()
# step NAME LIMIT COMMAND...: one of the steps, if it was chosen; the limit is in seconds.
step() {
    local step=$1 limit=$2 begin=$SECONDS status
    shift 2
    [[ " ${chosen[*]} record " == *" $step "* ]] || return 0
    echo "== $step, at most $limit s: $*"
    [[ $dry_run ]] && return 0
    # A group of its own, which only job control starts with SIGINT as it is. Interrupted, pytest still tells what
    # failed; it would not get to it if its workers were interrupted too.
    set -m
    timeout --foreground --signal=INT --kill-after=10 "$limit" "$@" &
    group=$!
    set +m
    wait "$group"
    status=$?
    # What a step leaves behind would take the next one's cores, and keep the log open.
    kill -KILL -- "-$group" 2>/dev/null
    group=""
    echo "== $step: status $status after $((SECONDS - begin)) s"
    ((status == 0)) || failed+=("$step")
}

# On every core where pytest-xdist is there.
spread=()
"$python" -c "import xdist" 2>/dev/null && spread=(-n "$(nproc)" --dist worksteal)

on_a_cpu=(data demo evaluate processing test_checkpoint.py test_checkpoint_errors.py test_checkpoint_writing.py test_cli.py
    test_config.py test_costs.py test_cuda_on_cpu.py test_gpu_code.py test_house.py test_layouts.py test_overrides.py
    test_packaging.py)

bench=("$python" -m vlcore.cli bench --device "$device" --dtype bfloat16 --json "$results" --plot "${results%.json}.png")

{
    # For this GPU only.
    CFLAGS=-w VLCORE_CUDA_ARCHS=$architecture step build 95 "$python" setup.py -q build_ext --inplace -j2
    # A thread each, or they would be in each other's way. Left out is what runs on a CPU alone, or needs a network.
    OMP_NUM_THREADS=1 step tests 140 "$python" -m pytest -q --tb=short --junit-xml="$folder/tests.xml" \
        "${on_a_cpu[@]/#/--ignore=tests/}" "${spread[@]}"
    tables=$(cat kernels/*.json)
    step tune 65 "$python" -m vlcore.bench.tune --minutes 0.9
    step tune-more 560 "$python" -m vlcore.bench.tune --minutes 9
    # What is measured from here on is no longer that commit's.
    [[ $tables == "$(cat kernels/*.json)" ]] || commit="${commit:+$commit, tuned}"
    step overhead 20 "${bench[@]}" --overhead
    step operators 100 "${bench[@]}" --no-compile
    step models 80 "${bench[@]}" --no-compile --model decode --model vision --model prefill --model train
    step compiled-operators 500 "${bench[@]}"
    step compiled-models 500 "${bench[@]}" --model vision --model prefill --model decode
    step record 20 "$python" -m vlcore.bench.record "$results" --device "$device" --commit "$commit" \
        --tests "$folder/tests.xml"
    tar czf "$folder/launch_tables.tar.gz" kernels/*.json
    echo "== failed: ${failed[*]:-none}"
} > >(tee "$folder/log.txt") 2>&1
wait
exit "${#failed[@]}"
