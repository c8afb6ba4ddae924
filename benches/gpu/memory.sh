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
bench="$python benches/gpu/bench_train.py --steps 6"
status=0

note() {
    echo "[$(($(date +%s) - started)) s] $*"
}

started=$(date +%s)
mkdir -p "$out/profile"
for shape in llama2-7b qwen2.5-7b llama3.1-8b; do
    $bench --shape "$shape" --weights "$folder/fastft-$shape" --only-write > "$out/write-$shape.log" 2>&1 &
done
$python -m pytest tests/gpu/test_memory.py -n 5 -rA -p no:cacheprovider > "$out/tests.log" 2>&1 || status=1
tail -n 1 "$out/tests.log"
wait
note "tests done, weights written"

# The popular recipe at 4,096 tokens of Llama-2-7B is in benches/results already; beside it the plain variant stands here.
$bench --shape llama2-7b --weights "$folder/fastft-llama2-7b" --contenders fastft --variants plain fused 8gb 6gb \
    --lengths 2048 4096 --table "$out/llama2-7b.md" --profile "$out/profile" > "$out/llama2-7b.log" 2>&1 || status=1
tail -n 2 "$out/llama2-7b.log"
rm -rf "$folder/fastft-llama2-7b"
note "llama2-7b done"

$bench --shape llama3.1-8b --weights "$folder/fastft-llama3.1-8b" --rank 32 --memory-gib 7 --longest 8gb --expandable \
    --least 4096 --most 20480 --table "$out/llama3.1-8b.md" > "$out/llama3.1-8b.log" 2>&1 || status=1
grep -E "fits|out of memory|expandable" "$out/llama3.1-8b.log"
rm -rf "$folder/fastft-llama3.1-8b"
note "llama3.1-8b done"

$bench --shape qwen2.5-7b --weights "$folder/fastft-qwen2.5-7b" --variants plain 8gb 6gb \
    --lengths 2048 4096 --table "$out/qwen2.5-7b.md" > "$out/qwen2.5-7b.log" 2>&1 || status=1
tail -n 2 "$out/qwen2.5-7b.log"
rm -rf "$folder/fastft-qwen2.5-7b"
note "qwen2.5-7b done"

cat "$out"/*.md
exit $status
