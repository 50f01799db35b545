#!/bin/sh
# Everything on a machine with a GPU, in one call: build, the CUDA checks, then times beside their roofs
# and peers. Times are taken only if the checks pass. Full results go to $OUT (build/cuda).
#
#   bench/cuda.sh                      all of it
#   bench/cuda.sh update               one topic: update, decode, profile, sanitize
#   ROWS='llamba-1b and 512' bench/cuda.sh decode      rows, as pytest's -k
#   PREBUILT=1 bench/cuda.sh           with the extension that is there
set -e
cd "$(dirname "$0")/.."
OUT=${OUT:-build/cuda}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
topics=${*:-update decode profile sanitize}
measure="$PYTHON -m pytest -p no:logging -p no:cacheprovider --benchmark-columns=median"

[ -n "$PREBUILT" ] || $PYTHON setup.py -q build_ext --inplace >"$OUT/build.log" 2>&1 ||
  { tail -20 "$OUT/build.log"; exit 1; }
$PYTHON -m pytest tests -m cuda -p no:cacheprovider --ignore-glob='*scaling*' --ignore-glob='*cli*' \
  >"$OUT/tests.log" 2>&1 || { tail -40 "$OUT/tests.log"; exit 1; }
echo "CUDA checks passed: $(grep -c . "$OUT/tests.log") lines in $OUT/tests.log"

for topic in $topics; do
  case $topic in
    update)
      $measure bench/bench_state_update.py bench/bench_mixer_update.py ${ROWS:+-k "$ROWS"} \
        --benchmark-json="$OUT/update.json" >"$OUT/update.log" 2>&1 || tail -20 "$OUT/update.log"
      sed -n '/roof 3.03/,$p' "$OUT/update.log" ;;
    decode)
      $measure bench/bench_decode.py ${ROWS:+-k "$ROWS"} \
        --benchmark-json="$OUT/decode.json" >"$OUT/decode.log" 2>&1 || tail -20 "$OUT/decode.log"
      sed -n '/roof 3.03/,$p' "$OUT/decode.log" ;;
    profile)  # bytes and throughput of one update at batch 512
      ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy \
        --metrics dram__bytes_read.sum,dram__bytes_write.sum --kernel-name regex:state_ --launch-skip 3 \
        $PYTHON bench/profile_update.py >"$OUT/profile.log" 2>&1 || tail -20 "$OUT/profile.log"
      grep -E "state_|Duration|DRAM Throughput|dram__bytes|Registers Per|Achieved Occ" "$OUT/profile.log" ;;
    sanitize)  # small shapes of the case tables
      for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --kernel-name-exclude regex=at:: \
          $PYTHON -m pytest -x -p no:cacheprovider -m cuda tests/test_state_update.py \
          tests/test_deferred_state_update.py tests/test_mixer_update.py tests/test_selective_scan.py \
          tests/test_linear.py tests/test_add_rms_norm.py tests/test_advance.py tests/test_rotate.py \
          -k "reference and not tiles and not stages" >"$OUT/$tool.log" 2>&1 || true
        echo "$tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/$tool.log")"
      done ;;
  esac
done
