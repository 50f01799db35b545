#!/bin/sh
# Everything on a machine with a GPU, in one call: build, the CUDA checks, then times beside their roofs
# and peers. Times are taken only if the checks pass. Full results go to $OUT (build/cuda).
#
#   bench/cuda.sh                      all of it
#   bench/cuda.sh update               one topic: update, decode, attention, scan, prefill, train
#                                      (times), profile, sanitize
#   ROWS='llamba-1b and 512' bench/cuda.sh decode      rows, as pytest's -k
#   PREBUILT=1 bench/cuda.sh           with the extension that is there
set -e
cd "$(dirname "$0")/.."
OUT=${OUT:-build/cuda}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
topics=${*:-update decode attention scan prefill train profile sanitize}
measure="$PYTHON -m pytest -p no:logging -p no:cacheprovider --benchmark-columns=median"

[ -n "$PREBUILT" ] || $PYTHON setup.py -q build_ext --inplace >"$OUT/build.log" 2>&1 ||
  { tail -20 "$OUT/build.log"; exit 1; }
parallel=$($PYTHON -c "import xdist" 2>/dev/null && echo "-n 8" || true)
$PYTHON -m pytest tests -m cuda $parallel -p no:cacheprovider --ignore-glob='*scaling*' --ignore-glob='*cli*' \
  >"$OUT/tests.log" 2>&1 || { tail -40 "$OUT/tests.log"; exit 1; }
echo "CUDA checks passed: $(grep -c . "$OUT/tests.log") lines in $OUT/tests.log"

# table NAME FILES: the rows of some benches, as a table
table() {
  name=$1
  shift
  $measure "$@" ${ROWS:+-k "$ROWS"} --benchmark-json="$OUT/$name.json" >"$OUT/$name.log" 2>&1 ||
    tail -20 "$OUT/$name.log"
  sed -n '/, roof /,$p' "$OUT/$name.log"
}

for topic in $topics; do
  case $topic in
    update) table update bench/bench_state_update.py bench/bench_mixer_update.py ;;
    decode) table decode bench/bench_decode.py bench/bench_generate.py ;;
    attention) table attention bench/bench_paged_attention.py bench/bench_sample.py ;;
    scan) table scan bench/bench_ssd_scan.py bench/bench_mixer_scan.py bench/bench_mamba1.py ;;
    prefill) table prefill bench/bench_prefill.py ;;
    train) table train bench/bench_distill.py ;;
    profile)  # bytes and throughput of decode's large kernels
      ncu --clock-control none --profile-from-start off --section SpeedOfLight --section Occupancy \
        --section MemoryWorkloadAnalysis --metrics dram__bytes_read.sum,dram__bytes_write.sum \
        $PYTHON bench/profile_decode.py >"$OUT/profile.log" 2>&1 || tail -20 "$OUT/profile.log"
      grep -E "_kernel|Duration|DRAM Throughput|dram__bytes|Registers Per|Achieved Occ" "$OUT/profile.log" ;;
    sanitize)  # the case tables, several files at a time; a line for each
      for tool in memcheck racecheck; do
        for file in state_update deferred_state_update many_rows mixer_update selective_scan linear \
          add_rms_norm advance rotate paged_attention rotate_append_kv ssd_scan causal_conv1d \
          mixer_scan sample gate distillation_losses; do echo $tool $file; done
      done | xargs -P 8 -L 1 sh -c '
        log=$0/$2-$3.log
        timeout ${LIMIT_S:-900} compute-sanitizer --tool $2 --kernel-name-exclude regex=at:: \
          "$1" -m pytest -x -p no:cacheprovider -m cuda tests/test_$3.py \
          -k "reference or many_rows" >"$log" 2>&1 || echo "exit status $?" >>"$log"
        echo "$2 $3:" $(grep -hE "SUMMARY: |(passed|failed).* in |^exit status" "$log")
        ' "$OUT" "$PYTHON" ;;
  esac
done
