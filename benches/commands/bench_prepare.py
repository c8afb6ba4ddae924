"""Rows of a data set to packed samples with masks, beside `datasets.map` row by row and trl's SFTTrainer, on one thread.

The rows are those of a file of questions and answers (columns instruction, input, output), repeated with a number before
each question so that no two are equal. Every contender ends with ids, labels and packed rows. `datasets.map` is the form
that most tools use: `apply_chat_template` for each row, with the mask by the length of the prompt. trl (with --trl, where it
is installed) is its SFTTrainer made on prompt and completion, which prepares the data; the time of making it on one row is
taken off. Before anything is timed, ids and labels of the contenders are compared.

    python benches/commands/bench_prepare.py ROWS.json TOKENIZER_FOLDER [--num 8000] [--rounds 3] [--trl]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[name] = "1"
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

MAX_LENGTH = 2048
Labels = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--num", type=int, default=8000, dest="num_rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl", action="store_true")
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    rows = many(json.loads(arguments.rows.read_text(encoding="utf-8")), arguments.num_rows)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        contenders: dict[str, Callable[[], Any]] = {
            "fastft": lambda: ours(file, tokenizer, None),
            "fastft, the library's tokens": lambda: without_core(file, tokenizer),
            "fastft, from its cache": lambda: ours(file, tokenizer, f"{folder}/cache"),
            "datasets.map, row by row": lambda: mapped(rows, tokenizer),
        }
        if arguments.trl:
            contenders["trl"] = lambda: by_trl(rows, tokenizer, folder)
        num_tokens = compare(contenders, tokenizer)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, work in contenders.items():
                seconds[name].append(cpu_seconds(work))
        fixed = cpu_seconds(lambda: by_trl(rows[:1], tokenizer, folder)) if arguments.trl else 0.0
    report(seconds, arguments.num_rows, num_tokens, fixed)


def many(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    return [
        {**rows[n % len(rows)], "instruction": f"{n // len(rows)} {rows[n % len(rows)]['instruction']}"}
        for n in range(count)
    ]


def ours(file: Path, tokenizer: Any, cache: str | None) -> Any:
    from fastft.config.schema import Data
    from fastft.data.prepare import prepare

    data = Data.model_validate({"train": [{"source": str(file)}], "max_length": MAX_LENGTH, "cache": cache})
    return prepare(data, "sft", tokenizer, seed=0)


def without_core(file: Path, tokenizer: Any) -> Any:
    os.environ["FASTFT_BYTE_LEVEL"] = "off"
    try:
        return ours(file, tokenizer, None)
    finally:
        del os.environ["FASTFT_BYTE_LEVEL"]


def turns(row: dict[str, str]) -> list[dict[str, str]]:
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part.strip())
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def mapped(rows: list[dict[str, str]], tokenizer: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()

    def tokens(row: dict[str, str]) -> dict[str, list[int]]:
        messages = turns(row)
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(messages, return_dict=False)[:MAX_LENGTH]
        return {"input_ids": ids, "labels": ([-100] * len(prompt) + ids[len(prompt) :])[:MAX_LENGTH]}

    return datasets.Dataset.from_list(rows).map(tokens, remove_columns=list(rows[0]))


def by_trl(rows: list[dict[str, str]], tokenizer: Any, folder: str) -> Any:
    import datasets
    import trl
    from transformers import LlamaConfig, LlamaForCausalLM

    datasets.disable_progress_bars()
    datasets.disable_caching()
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape))
    arguments = trl.SFTConfig(
        output_dir=f"{folder}/trl", max_length=MAX_LENGTH, packing=True, report_to="none", use_cpu=True, bf16=False
    )
    pairs = [{"prompt": turns(row)[:1], "completion": turns(row)[1:]} for row in rows]
    data = datasets.Dataset.from_list(pairs)
    return trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer).train_dataset


def compare(contenders: dict[str, Callable[[], Any]], tokenizer: Any) -> int:
    """Hold ids and learned ids of all samples against each other; returns the number of tokens."""
    line_end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    found = {name: work() for name, work in contenders.items()}

    def documents(result: Any) -> list[tuple[list[int], list[int]]]:
        collection = result.train.collection
        parts = (collection.document(number) for number in range(len(collection)))
        return [(ids.tolist(), ids[learned].tolist()) for ids, learned in parts]

    expected = [
        (row["input_ids"], [label for label in row["labels"] if label >= 0])
        for row in found["datasets.map, row by row"]
    ]
    for name, result in found.items():
        if not name.startswith("fastft"):
            continue
        for (ids, learned), (their_ids, their_learned) in zip(documents(result), expected, strict=True):
            assert ids == their_ids, name
            # The template's line end after the answer is no part of what fastft learns.
            assert learned == their_learned or learned + line_end == their_learned, name
    num_tokens = sum(len(ids) for ids, _ in expected)
    if "trl" in found:
        theirs = sum(len(row["input_ids"]) for row in found["trl"])
        assert theirs == num_tokens, f"trl made {theirs} tokens of {num_tokens}"
    return num_tokens


def cpu_seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def report(seconds: dict[str, list[float]], num_rows: int, num_tokens: int, fixed: float) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "datasets"))
    print(f"{num_rows:,} rows, {num_tokens / num_rows:.0f} tokens each; one thread, CPU seconds; {versions}")
    if fixed:
        print(f"trl {version('trl')}; {fixed:.2f} s for a trainer of one row are taken off")
    print("| contender | min | median | max | rows/s (median) | times fastft |")
    print("|---|---|---|---|---|---|")
    ours_median = statistics.median(seconds["fastft"])
    for name, found in seconds.items():
        times = [s - fixed for s in found] if name == "trl" else found
        median = statistics.median(times)
        print(
            f"| {name} | {min(times):.2f} | {median:.2f} | {max(times):.2f} | {num_rows / median:,.0f} | "
            f"{median / ours_median:.2f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
