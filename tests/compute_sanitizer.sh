#!/usr/bin/env bash
# compute-sanitizer's four tools over a small run of every CUDA kernel, or of the families named:
#
#     tests/compute_sanitizer.sh [FAMILY...]
#
# Ends with 1 where a tool reports a kernel of this package, or the run fails; reports of other libraries' kernels
# (cuBLAS has some) are counted and pass. TOOLS="memcheck racecheck synccheck initcheck", PYTHON and LOGS may be set.
set -uo pipefail
cd "$(dirname "$0")/.."
tools=${TOOLS:-memcheck racecheck synccheck initcheck}
logs=${LOGS:-build/compute-sanitizer}
python=${PYTHON:-python}
command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not on PATH; it is part of the CUDA toolkit" >&2; exit 1; }
mkdir -p "$logs"

failed=0
for tool in $tools; do
  log=$logs/$tool.log
  # Without host frames a line names this package only where its kernel is reported. 97: something was reported.
  compute-sanitizer --tool "$tool" --print-limit 1000 --show-backtrace no --error-exitcode 97 --log-file "$log" \
    "$python" tests/every_kernel.py "$@" > "$logs/$tool.out" 2>&1
  status=$?
  ours=$(grep -c 'flash_xlstm' "$log")
  all=$(sed -n 's/.*SUMMARY: \([0-9]*\) .*/\1/p' "$log" | tail -1)
  # A run that ended early proves nothing.
  ran=$(grep -c '^ran the family' "$logs/$tool.out")
  wanted=$#
  if [ "$wanted" -eq 0 ]; then wanted=$("$python" tests/every_kernel.py --families | wc -l); fi
  if { [ $status -ne 0 ] && [ $status -ne 97 ]; } || [ "$ran" -ne "$wanted" ] || [ -z "$all" ]; then
    echo "$tool: the run failed ($ran of $wanted families, status $status): $logs/$tool.out, $log"
    failed=1
  elif [ "$ours" -ne 0 ]; then
    echo "$tool: $ours lines name kernels of this package: $log"
    failed=1
  else
    echo "$tool: nothing of ours in $ran families ($all reports of other libraries' kernels)"
  fi
done
exit $failed
