"""The embedded demo: its text, its tokenizer, its rows and its base model fit together."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fastft import demo
from fastft.demo import corpus, dialogues, generate, stories, village
from fastft.demo.words import Dice

FOLDER = Path(demo.__file__).parent
BASE = FOLDER / "base"
FILES = ("chat.jsonl", "chat_eval.jsonl", "preferences.jsonl")


def test_the_shipped_rows_are_what_the_generator_writes(tmp_path):
    generate.write_chat(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / "data" / name).read_bytes(), f"run demo.generate: {name}"


def test_the_text_is_the_same_for_the_same_seed_and_another_for_another():
    assert list(corpus.documents(50, seed=3)) == list(corpus.documents(50, seed=3))
    assert list(corpus.documents(50, seed=3)) != list(corpus.documents(50, seed=4))


def test_the_first_document_is_the_one_written_down():
    # Written down when the base was trained: another Python version must make the same text.
    assert next(corpus.documents(1)) == (
        "Once upon a time there was a young lamb named Karl. It was a sunny day, and Karl had nothing to do. He looked "
        "at the ball and had an idea. They made a little house in the school. They asked a cow to come with them. "
        "They played until the sun went down. That night Karl slept very well."
    )


def test_text_and_rows_are_ascii():
    assert all(document.isascii() for document in corpus.documents(2_000))
    assert all((FOLDER / "data" / name).read_bytes().isascii() for name in FILES)


def test_a_story_names_its_hero_with_the_right_pronouns():
    dice = Dice(5)
    for _ in range(300):
        about = stories.hero(dice, "Mia", "girl")
        told = stories.story(dice, about)
        assert "Mia" in told
        assert "{" not in told
    assert stories.hero(dice, "Ben", "boy").pronouns == ("he", "his", "him")
    assert stories.hero(dice, "Mia").pronouns == ("she", "her", "her")


def test_sums_in_rows_are_right():
    sums = set()
    for question, answer in _questions_and_answers("chat.jsonl"):
        if " + " in answer:
            terms, total = answer.split(" = ")
            left, right = terms.split(" + ")
            assert int(left) + int(right) == int(total)
            assert terms in question
            sums.add(terms)
    assert len(sums) == 81 - len(dialogues.HELD_OUT_SUMS)


def test_held_out_names_and_questions_stay_out_of_the_training_rows():
    questions = [question for question, _ in _questions_and_answers("chat.jsonl")]
    for name in dialogues.HELD_OUT_NAMES:
        assert not any(name in question for question in questions)
    for question, _ in _questions_and_answers("chat_eval.jsonl"):
        assert question not in questions


def test_there_are_some_hundred_rows_of_every_subject():
    subjects = Counter(answer.split()[0] for _, answer in _questions_and_answers("chat.jsonl"))
    assert 400 <= sum(subjects.values()) <= 700
    assert subjects["Once"] == dialogues.NUM_STORY_ROWS


def test_village_talks_have_none_of_the_behaviour_that_is_taught():
    dice = Dice(6)
    answers = [m["content"] for _ in range(2_000) for m in village.talk(dice) if m["role"] == "assistant"]
    assert len(answers) > 2_000
    for probe in dialogues.probes():
        assert not any(probe.learned(answer) for answer in answers), probe


def test_the_rows_themselves_pass_the_probes():
    answers = dict(_questions_and_answers("chat.jsonl")) | dict(_questions_and_answers("chat_eval.jsonl"))
    asked = [probe for probe in dialogues.probes() if probe.prompt in answers]
    assert len(asked) >= 8
    assert all(probe.learned(answers[probe.prompt]) for probe in asked)


def test_cached_text_is_written_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(corpus, "NUM_DOCUMENTS", 20)
    path = corpus.cached_text()
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == list(corpus.documents(20))
    written_at = path.stat().st_mtime_ns
    assert corpus.cached_text() == path
    assert path.stat().st_mtime_ns == written_at
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_sizes_of_what_travels_in_the_package():
    assert (BASE / "model.safetensors").stat().st_size <= 4_000_000
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.suffix != ".pyc") <= 5_000_000


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def test_the_tokenizer_gives_every_text_back(tokenizer):
    texts = list(corpus.documents(2_000)) + [text for row in _questions_and_answers("chat.jsonl") for text in row]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    beyond_ascii = "Zoë said: 你好 🙂\t\u0000"
    assert tokenizer.decode(tokenizer.encode(beyond_ascii)) == beyond_ascii


def test_the_template_writes_what_the_base_has_read(tokenizer):
    dice = Dice(7)
    for _ in range(50):
        messages = village.talk(dice)
        assert tokenizer.apply_chat_template(messages, tokenize=False) == village.chat_marks(messages)


def test_the_template_marks_the_answer_and_its_end(tokenizer):
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good day."}]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "Good day.<|im_end|>"


def test_the_rows_use_no_token_that_the_base_has_hardly_read(tokenizer):
    # Embeddings are frozen in the fine-tuning: an untrained token spoils its answers. The base read 35,000 documents.
    read = Counter(token for text in corpus.documents(10_000) for token in tokenizer.encode(text))
    for name in ("chat.jsonl", "chat_eval.jsonl"):
        for line in (FOLDER / "data" / name).read_text().splitlines():
            messages = json.loads(line)["messages"]
            for token in tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False)):
                assert read[token] >= 10, f"{tokenizer.decode([token])!r} in {messages}"


def test_the_base_reads_unseen_text_well(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    num_tokens = total = 0.0
    for text in corpus.documents(40, seed=99):
        ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
        total += loss * (ids.shape[1] - 1)
        num_tokens += ids.shape[1] - 1
    # The run that made it ended at 0.78 on other unseen documents; a model that knows nothing has ln(1280) = 7.2.
    assert total / num_tokens < 1.0


def test_the_base_lacks_what_the_fine_tuning_teaches(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    for probe in dialogues.probes():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": probe.prompt}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=80,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert not probe.learned(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)), probe


def _questions_and_answers(name):
    rows = [json.loads(line)["messages"] for line in (FOLDER / "data" / name).read_text().splitlines()]
    return [(messages[0]["content"], messages[1]["content"]) for messages in rows]
