"""Tasks dpo, orpo, kto and reward: they learn what they should, and compare with the model that they started from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import tiny_run
from fastft.config.schema import Config
from fastft.errors import CheckpointError, ConfigError, FastftError
from fastft.training import run
from fastft.training.preferences import PreferenceTrainer

TASKS = ("dpo", "orpo", "kto", "reward")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    pairs, judged = tiny_run.write_pairs(folder / "pairs.jsonl"), tiny_run.write_judged(folder / "judged.jsonl")
    return {task: judged if task == "kto" else pairs for task in TASKS}


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["full", "freeze", "lora", "qlora"])
@pytest.mark.parametrize("task", TASKS)
def test_the_better_answer_wins(task: str, kind: str, model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_run.config(model, data[task], task=task, kind=kind, train__max_steps=12, data__eval_rows=2)
    done = run.run(config, work_dir=tmp_path / "run")
    lines = [line for line in _metrics(done.run_dir) if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["margin"] > lines[0]["margin"]
    assert lines[-1]["accuracy"] == 1.0
    (evaluated,) = [line for line in _metrics(done.run_dir) if "eval_loss" in line]
    assert evaluated["eval_accuracy"] == 1.0
    record = json.loads((done.artifact / "fastft_training.json").read_text())
    assert (record["task"], record["method"]) == (task, kind)


def _log_probs(model: Path, config: Config, rows: Any) -> torch.Tensor:
    """By transformers alone, one sample at a time without padding: [rows, 2], fp64."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    found = []
    for row in rows:
        for sample in (row.first, row.second):
            ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
            with torch.no_grad():
                log_probs = functional.log_softmax(plain(input_ids=ids).logits[0, :-1], dim=-1)
            learned = labels[1:] != -100
            found.append(log_probs[learned, labels[1:][learned]].sum())
    del config
    return torch.stack(found).view(-1, 2)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_the_reference_is_the_base(
    task: str, kind: str, model: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, whatever the model has become: log probabilities by transformers in fp64 of the folder's weights."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    own = PreferenceTrainer._reference

    def watched(self: PreferenceTrainer, inputs: Any, part: str) -> torch.Tensor:
        reference = own(self, inputs, part)
        seen.append((inputs["rows"].clone(), reference.clone()))
        rows.append(self.rows)
        return reference

    rows: list[Any] = []
    monkeypatch.setattr(PreferenceTrainer, "_reference", watched)
    config = tiny_run.config(model, data[task], task=task, kind=kind, train__max_steps=8)
    run.run(config, work_dir=tmp_path / "run")
    expected = _log_probs(model, config, rows[0])
    assert len(seen) == 8
    for numbers, reference in seen:
        # Sums of up to 60 log probabilities of size 6 in fp32: 60 * 6 * 2^-23 and what two layers of width 32 add.
        torch.testing.assert_close(reference.double(), expected[numbers], rtol=0, atol=2e-3)


def test_a_reward_is_read_at_the_last_token(model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    """The saved model gives its numbers in transformers too, where padding is of another id than the text's end."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config = tiny_run.config(model, data["reward"], task="reward", kind="full", train__max_steps=12)
    done = run.run(config, work_dir=tmp_path / "run")
    trained = AutoModelForSequenceClassification.from_pretrained(done.artifact).eval()
    tokenizer = AutoTokenizer.from_pretrained(done.artifact)
    assert trained.config.num_labels == 1
    scores = []
    for answer in ("apple apple ", "pear pear "):
        turns = [{"role": "user", "content": tiny_run.QUESTIONS[1]}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        with torch.no_grad():
            scores.append(float(trained(**tokenizer(text, return_tensors="pt")).logits))
    assert scores[0] > scores[1]


def test_a_reward_model_is_given_no_prompts(model: Path, data: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="a reward model gives numbers and no answers"):
        tiny_run.config(model, data["reward"], task="reward", samples__prompts=("Hello",))


@pytest.mark.parametrize("task", ["dpo", "orpo", "reward"])
def test_accumulated_rows_are_one_step(task: str, model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    """Four rows at once, or one after the other: the same weights; kto's drift is a batch's own, so it is left out."""
    found = []
    for batch, accumulation in ((4, 1), (1, 4)):
        config = tiny_run.config(
            model, data[task], task=task, kind="full", train__batch_size=batch,
            train__grad_accumulation=accumulation, train__max_steps=4, train__lr=1e-3,
        )  # fmt: skip
        done = run.run(config, work_dir=tmp_path / f"{batch}x{accumulation}")
        found.append(
            (load_file(done.artifact / "model.safetensors"), [line["loss"] for line in _metrics(done.run_dir)])
        )
    (expected, losses), (weights, other_losses) = found
    # As in test_accumulation: AdamW moves a weight whose gradient is near zero by up to the rate, of which 1 % is allowed.
    assert other_losses == pytest.approx(losses, rel=1e-4)
    for name, value in expected.items():
        assert (weights[name] - value).abs().max() < 1e-5, name


def test_both_answers_are_shown(model: Path, data: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    run.dry_run(tiny_run.config(model, data["dpo"], task="dpo"), work_dir=tmp_path / "run")
    said = capsys.readouterr().err
    assert "[[apple <|im_end|>" in said
    assert "[[pear <|im_end|>" in said
    assert "dry run: 6 steps" in said


def test_a_preference_task_says_what_data_it_needs(model: Path, tmp_path: Path) -> None:
    rows = tiny_run.write_dialogues(tmp_path / "rows.jsonl")
    with pytest.raises(Exception, match="task dpo needs two answers to each prompt"):
        run.run(tiny_run.config(model, rows, task="dpo"), work_dir=tmp_path / "run")
    bare = tiny_run.write_model(tmp_path / "bare", chat_template=None)
    pairs = tiny_run.write_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(ConfigError, match="no chat template, so a dialogue has no form"):
        run.run(tiny_run.config(bare, pairs, task="dpo"), work_dir=tmp_path / "run")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_reward_model_does_not_talk(kind: str, model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    """Transformers would give it a head of random numbers."""
    from fastft.chat import session

    config = tiny_run.config(model, data["reward"], task="reward", kind=kind, train__max_steps=1)
    done = run.run(config, work_dir=tmp_path / "run")
    with pytest.raises(CheckpointError, match="a reward model gives an answer a number; it does not talk"):
        session.load(str(done.artifact))


@pytest.mark.parametrize(("kind", "tied"), [("lora", False), ("lora", True), ("qlora", False)])
def test_a_reward_adapter_merges_into_a_classifier(
    kind: str, tied: bool, data: dict[str, Path], tmp_path: Path
) -> None:
    """Loaded by transformers it gives the scores that peft's own merge onto the same base gives."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fastft.__main__ import main

    model = tiny_run.write_model(tmp_path / "model", tie_word_embeddings=tied)
    config = tiny_run.config(model, data["reward"], task="reward", kind=kind, train__max_steps=6)
    done = run.run(config, work_dir=tmp_path / "run")
    merged = tmp_path / "merged"
    words = ["convert", "merge", str(model), str(done.artifact), str(merged), "--dequantized-base", "none"]
    assert main(words) == 0
    ours = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=0)
    theirs = PeftModel.from_pretrained(plain, done.artifact).merge_and_unload().eval()
    assert (type(ours).__name__, ours.config.num_labels) == ("LlamaForSequenceClassification", 1)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        # f32: peft's sum is in another order.
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    texts = tokenizer(["apple apple", "pear"], return_tensors="pt", padding=True)
    assert ours(**texts).logits.shape == (2, 1)  # pad_token_id came along
    words = ["convert", "verify", str(merged), "--base", str(model), "--adapter", str(done.artifact)]
    assert main([*words, "--dequantized-base", "none"]) == 0


def test_a_reward_adapter_and_another_do_not_merge_into_one(model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    from fastft.convert import merge

    reward = tiny_run.config(model, data["reward"], task="reward", kind="lora", train__max_steps=1)
    dpo = tiny_run.config(model, data["dpo"], task="dpo", kind="lora", train__max_steps=1)
    adapters = [
        (run.run(config, work_dir=tmp_path / name).artifact, 1.0) for name, config in (("r", reward), ("d", dpo))
    ]
    with pytest.raises(FastftError, match="makes a classifier of the model, the other adapters do not"):
        merge.plan(model, adapters)
