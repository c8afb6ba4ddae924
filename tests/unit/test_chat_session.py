"""Answers: the right prompt, the right end, streamed as they are, and the same for the same seed."""

import io
import json
from pathlib import Path

import pytest

import tiny_run
from fastft.chat import repl, session
from fastft.data.dialogue import Message
from fastft.errors import CheckpointError, ConfigError, HubError, UsageError
from fastft.training import run

GREEDY = session.Sampling(max_new_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return tiny_run.write_model(folder / "model")


@pytest.fixture(scope="module")
def taught(folder: Path, model: Path) -> run.RunResult:
    """A model that has learned to answer one question by heart."""
    data = folder / "one.jsonl"
    data.write_text(json.dumps({"instruction": "Who are you?", "input": "", "output": "a basket of pears"}) + "\n")
    settings = {
        "train__max_steps": 60,
        "train__lr": 0.02,
        "train__log_steps": 60,
        "method__lora": {"r": 16, "alpha": 32},
    }
    return run.run(tiny_run.config(model, data, **settings), work_dir=folder / "run")


@pytest.fixture(scope="module")
def talk(taught: run.RunResult) -> session.Talk:
    return session.load(str(taught.artifact))


def test_an_adapter_finds_its_base_and_answers_what_it_learned(talk: session.Talk, model: Path) -> None:
    assert session.answer(talk, "Who are you?", GREEDY) == "a basket of pears"
    assert session.answer(session.load(str(model)), "Who are you?", GREEDY) != "a basket of pears"


def test_base_and_adapter_given_apart(taught: run.RunResult, model: Path) -> None:
    both = session.load(str(model), adapter=str(taught.artifact))
    assert session.answer(both, "Who are you?", GREEDY) == "a basket of pears"
    with pytest.raises(ConfigError, match="this is an adapter already"):
        session.load(str(taught.artifact), adapter=str(taught.artifact))


def test_the_pieces_are_the_answer(talk: session.Talk) -> None:
    pieces: list[str] = []
    said = session.answer(talk, "Who are you?", GREEDY, pieces.append)
    assert "".join(pieces) == said
    assert len(pieces) > 3


def test_the_end_of_turn_is_a_stop(talk: session.Talk) -> None:
    """Neither generation_config nor eos names <|im_end|>: it is learned from the template."""
    ids = talk.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert talk.stops == sorted(ids)


def test_the_seed_decides(talk: session.Talk) -> None:
    import torch

    hot = {"max_new_tokens": 12, "temperature": 5.0, "top_k": 0, "top_p": 1.0}
    state = torch.random.get_rng_state()
    one, same, other = (session.answer(talk, "Hello", session.Sampling(**hot, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_without_template_continues(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tiny_run.write_model(folder / "bare", chat_template=None)
    talk = session.load(str(bare))
    assert "continues your text" in capsys.readouterr().err
    ids = talk.prompt_ids([Message("user", "Basket 3 holds")])
    assert talk.tokenizer.decode(ids) == "Basket 3 holds"


def test_4_bit(model: Path) -> None:
    import bitsandbytes

    talk = session.load(str(model), bits=4)
    packed = [m for m in talk.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 2 * 7
    assert isinstance(session.answer(talk, "Who?", session.Sampling(max_new_tokens=2)), str)


def test_a_missing_base_is_said(taught: run.RunResult, tmp_path: Path) -> None:
    lost = tmp_path / "adapter"
    lost.mkdir()
    config = json.loads((taught.artifact / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere/model"}))
    with pytest.raises(HubError, match=r"the base of adapter .* cannot be found.*fastft chat BASE --adapter DIR"):
        session.load(str(lost))
    (lost / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not name its base"):
        session.load(str(lost))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"repetition_penalty": 0}]
)
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: .* is not allowed"):
        session.Sampling(**wrong)


def test_a_prompt_prints_only_the_answer(talk: session.Talk, capsys: pytest.CaptureFixture[str]) -> None:
    assert repl.run(talk, GREEDY, prompt="Who are you?") == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a basket of pears\n", "")
    with pytest.raises(UsageError, match="--prompt is empty"):
        repl.run(talk, GREEDY, prompt=" ")


def test_each_line_of_a_pipe_is_a_question(
    talk: session.Talk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n\n  \nWho are you?\n"))
    assert repl.run(talk, GREEDY) == 0
    assert capsys.readouterr().out == "a basket of pears\n" * 2


def test_a_conversation_remembers_resets_and_ends(
    talk: session.Talk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    asked: list[list[Message]] = []

    def answer(_talk: object, messages: list[Message], _sampling: object, on_text: session.OnText) -> str:
        asked.append(messages)
        on_text("half ")
        if messages[-1].content == "stop":
            raise KeyboardInterrupt
        on_text("whole")
        return "half whole"

    monkeypatch.setattr("sys.stdin", Terminal())
    words = iter(["one", "", "stop", "two", "reset", "three", "EXIT", "never"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(words))
    monkeypatch.setattr(session, "answer", answer)
    assert repl.run(talk, GREEDY, system="Be kind.") == 0
    assert [[m.content for m in messages] for messages in asked] == [
        ["Be kind.", "one"],
        ["Be kind.", "one", "half whole", "stop"],
        ["Be kind.", "one", "half whole", "stop", "half ", "two"],
        ["Be kind.", "three"],
    ]
    assert "(stopped)" in capsys.readouterr().err
