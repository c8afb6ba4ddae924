#!/usr/bin/env bash
# Instructions per value of the NF4 kernels, counted by callgrind: numbers that do not depend on what else runs here.
#
#   benches/kernels/instructions.sh
#
# Fails where a count is above its limit in instructions.txt (level, name, most). AVX-512 is not counted: valgrind 3.19
# does not know it.
set -euo pipefail
cd "$(dirname "$0")/../.."
limits=benches/kernels/instructions.txt
values=524288 # `--once` works on 1 MiB of bf16

command -v valgrind > /dev/null || { echo "error: valgrind is not installed" >&2; exit 1; }
bench=$(cargo bench --locked -p fastft-kernels --bench nf4 --no-run 2>&1 | sed -n 's/.*Executable.*(\(.*\))/\1/p')

count() { # LEVEL NAME: all instructions of a process
  valgrind --tool=callgrind --callgrind-out-file=/dev/null "$bench" --once "$1" "$2" 2>&1 \
    | sed -n 's/.*Collected : \([0-9]*\).*/\1/p'
}

failed=0
while read -r level name most; do
  counted=$(($(count "$level" "$name") - $(count "$level" nothing)))
  per_value=$(awk -v counted="$counted" -v values="$values" 'BEGIN { printf "%.2f", counted / values }')
  echo "$level $name: $per_value instructions per value, at most $most"
  if awk -v found="$per_value" -v most="$most" 'BEGIN { exit !(found > most) }'; then
    echo "error: $level $name takes more than $most" >&2
    failed=1
  fi
done < "$limits"
exit "$failed"
