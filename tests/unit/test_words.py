"""The words of a command line against a signature: what passes, what is refused, what Fire makes of it."""

from typing import Literal

import pytest

from fastft.__main__ import _bind
from fastft.cli import words
from fastft.cli.job import Job
from fastft.cli.words import BareAuto
from fastft.errors import UsageError

seen: dict[str, object] = {}


def sample(
    config: str,
    *overrides: str,
    is_clip: bool = False,
    adapter: tuple[str, ...] = (),
    bits: Literal["4", "8"] | None = None,
    resume: BareAuto = None,
    seed: int | None = None,
    system: str | None = None,
) -> Job:
    """Do something."""
    seen.clear()
    seen.update(locals())
    return Job(lambda: 0)


def bind(*typed: str) -> dict[str, object]:
    _bind("sample", sample, words.check("sample", sample, typed, {"s": "system"}))
    return dict(seen)


def test_a_switch_does_not_swallow_the_next_word() -> None:
    got = bind("--is-clip", "A", "b=1")
    assert (got["is_clip"], got["config"], got["overrides"]) == (True, "A", ("b=1",))


@pytest.mark.parametrize("text", ["12345", "[x]", "None", "1e5", "a,b", "{1}", "True", "-", "", "x=y", "--"[:1] + "5"])
def test_text_stays_text(text: str) -> None:
    assert bind("c", f"--system={text}")["system"] == text


def test_a_place_that_looks_like_a_number_stays_text() -> None:
    assert bind("007")["config"] == "007"


def test_overrides_are_kept_in_order() -> None:
    assert bind("c", "a.b=1", "c=[1,2]")["overrides"] == ("a.b=1", "c=[1,2]")


def test_xtuner_cfg_options_are_overrides() -> None:
    got = bind("c", "--cfg-options", "a=1", "b=2", "--is-clip")
    assert got["overrides"] == ("a=1", "b=2")
    assert got["is_clip"] is True


def test_an_option_given_twice_is_collected_or_refused() -> None:
    assert bind("c", "--adapter", "x:1", "--adapter=12")["adapter"] == ("x:1", "12")
    with pytest.raises(UsageError, match="--seed is given twice"):
        bind("c", "--seed", "1", "--seed", "2")


def test_numbers_are_numbers() -> None:
    assert bind("c", "--seed", "7")["seed"] == 7
    with pytest.raises(UsageError, match=r"--seed 1\.5: not a whole number"):
        bind("c", "--seed", "1.5")


def test_choices_are_held() -> None:
    assert bind("c", "--bits", "4")["bits"] == "4"
    with pytest.raises(UsageError, match="--bits 3: allowed are 4, 8"):
        bind("c", "--bits", "3")


def test_resume_may_stand_alone() -> None:
    assert bind("c", "--resume")["resume"] == "auto"
    assert bind("c", "--resume", "--is-clip")["resume"] == "auto"
    assert bind("c", "--resume", "run/checkpoint-3")["resume"] == "run/checkpoint-3"
    assert bind("c", "--resume", "a=1")["overrides"] == ("a=1",)


def test_hyphens_and_underscores_are_the_same() -> None:
    assert bind("c", "--is_clip")["is_clip"] is True


def test_short_option() -> None:
    assert bind("c", "-s", "hello")["system"] == "hello"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["c", "--is-clipp"], "did you mean --is-clip"),
        (["c", "--lr", "1"], "did you mean train.lr=VALUE"),
        (["c", "-x"], "there is no option -x"),
        ([], "CONFIG missing"),
        (["a", "b"], "`b` is one word too many"),
        (["c", "--system"], "--system needs a value"),
        (["c", "--system", "--is-clip"], "--system needs a value"),
        (["c", "--is-clip=maybe"], "neither true nor false"),
    ],
)
def test_wrong_words_are_refused(typed: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bind(*typed)
