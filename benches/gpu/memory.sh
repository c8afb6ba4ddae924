#!/bin/sh
# The memory switches on one GPU in about four minutes: their tests, and peaks and speed of 7B QLoRA.
#
#     FOLDER=/dev/shm OUT=results sh benches/gpu/memory.sh
#
# FOLDER needs 45 GB for the weights of three shapes, which are written while the tests run. Logs and tables go to OUT.
# What fails is said at the end and does not stop the rest.
set -u
folder=${FOLDER:-/dev/shm}
out=${OUT:-.}
python=${PYTHON:-python3}
bench="$python benches/gpu/bench_train.py --steps 5"
status=0

note() {
    echo "[$(($(date +%s) - started)) s] $*"
}

started=$(date +%s)
mkdir -p "$out/profile"
for shape in llama2-7b qwen2.5-7b llama3.1-8b; do
    (
        $bench --shape "$shape" --weights "$folder/fastft-$shape" --only-write || exit 1
        [ "$shape" = llama3.1-8b ] || exit 0
        # What fits does not depend on what else runs on a large card.
        $bench --shape "$shape" --weights "$folder/fastft-$shape" --rank 32 --memory-gib 7 --longest 8gb --expandable \
            --least 8192 --most 24576 --table "$out/$shape.md"
    ) > "$out/first-$shape.log" 2>&1 &
done
$python -m pytest tests/gpu/test_memory.py -n 5 -rA -p no:cacheprovider -p no:benchmark > "$out/tests.log" 2>&1 || status=1
tail -n 1 "$out/tests.log"
note "tests done"
wait
grep -hE "fits|out of memory|expandable|written|rror" "$out"/first-*.log
rm -rf "$folder/fastft-llama3.1-8b"
note "weights written, the longest row found"

# The popular recipe on Llama-2-7B is in benches/results already; beside it the plain variant stands here.
$bench --shape llama2-7b --weights "$folder/fastft-llama2-7b" --contenders fastft --variants plain 8gb 6gb \
    --lengths 2048 4096 --table "$out/llama2-7b.md" --profile "$out/profile" > "$out/llama2-7b.log" 2>&1 || status=1
tail -n 2 "$out/llama2-7b.log"
rm -rf "$folder/fastft-llama2-7b"
note "llama2-7b done"

$bench --shape qwen2.5-7b --weights "$folder/fastft-qwen2.5-7b" --variants plain 8gb 6gb \
    --lengths 2048 4096 --table "$out/qwen2.5-7b.md" > "$out/qwen2.5-7b.log" 2>&1 || status=1
tail -n 2 "$out/qwen2.5-7b.log"
rm -rf "$folder/fastft-qwen2.5-7b"
note "qwen2.5-7b done"

cat "$out"/*.md
exit $status
