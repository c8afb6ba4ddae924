"""The demo that learns to see: its pictures, its tower, and a short form of its training."""

import json
from pathlib import Path

import pytest

from fastft import demo
from fastft.__main__ import main
from fastft.chat import session
from fastft.config import load
from fastft.demo import pictures
from fastft.training import run

FOLDER = Path(demo.__file__).parent
DATA = FOLDER / "data"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    "ignore:.*_check_is_size.*:FutureWarning",
)
GREEDY = session.Sampling(max_new_tokens=12, temperature=0)


def test_the_shipped_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    """By their pixels: another version of Pillow may pack them otherwise."""
    from PIL import Image

    pictures.write(tmp_path)
    assert (tmp_path / "vision.jsonl").read_bytes() == (DATA / "vision.jsonl").read_bytes()
    drawn = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in drawn] == sorted(path.name for path in (DATA / "pictures").iterdir())
    assert len(drawn) == 12
    for path in drawn:
        with Image.open(path) as mine, Image.open(DATA / "pictures" / path.name) as shipped:
            assert mine.tobytes() == shipped.tobytes(), path.name
            assert shipped.size == (64, 64)


def test_a_picture_shows_one_shape_of_its_colour() -> None:
    for colour, shape in pictures.names():
        picture = pictures.draw(colour, shape)
        counted = {pixel: count for count, pixel in picture.getcolors()}
        assert set(counted) == {(244, 241, 234), pictures.COLOURS[colour]}, (colour, shape)
        left, top, right, bottom = picture.convert("L").point(lambda v: 255 * (v < 235)).getbbox()
        share = counted[pictures.COLOURS[colour]] / ((right - left) * (bottom - top))
        expected = {"square": 1.0, "circle": 0.785, "triangle": 0.5}[shape]
        assert abs(share - expected) < 0.04, (colour, shape, share)


def test_the_shipped_tower_is_small_and_is_what_the_script_makes(tmp_path: Path) -> None:
    from fastft.demo import tower

    tower.write(tmp_path / "clip")
    shipped, made = (
        json.loads((folder / "config.json").read_text()) for folder in (FOLDER / "clip", tmp_path / "clip")
    )
    assert {key: shipped[key] for key in tower.CONFIG} == {key: made[key] for key in tower.CONFIG} == tower.CONFIG
    assert sum(path.stat().st_size for path in (FOLDER / "clip").iterdir()) < 1_000_000


def test_a_short_form_learns_to_name_pictures(tmp_path: Path) -> None:
    """Three of the dozen, one question each; merged, and asked through the chat."""
    chosen = [("red", "circle"), ("blue", "square"), ("black", "triangle")]
    names = {f"pictures/{colour}_{shape}.png" for colour, shape in chosen}
    rows = [row for row in pictures.rows() if row["image"] in names][::2]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [
        f"data.train.0.source={tmp_path / 'rows.json'}",
        f"data.train.0.images={DATA}",
        "train.max_steps=60",
        "train.batch_size=3",
    ]
    config = load.load("demo_vision", words).config
    result = run.run(config, work_dir=tmp_path / "run")
    merged = tmp_path / "merged"
    assert main(["convert", "merge", "demo", str(result.artifact), str(merged)]) == 0
    talk = session.load(str(merged))
    said = {
        (colour, shape): session.answer(
            talk,
            session.question(
                pictures.QUESTIONS[0], images=[session.image(str(DATA / f"pictures/{colour}_{shape}.png"))]
            ),
            GREEDY,
        )
        for colour, shape in chosen
    }
    assert said == {pair: pictures.answer(*pair) for pair in chosen}


@pytest.mark.slow
def test_the_whole_demo_names_the_dozen(tmp_path: Path) -> None:
    """As a user runs it: train, merge, verify, ask about every picture."""
    run_folder, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["train", "demo_vision", "--work-dir", str(run_folder)]) == 0
    assert main(["convert", "merge", "demo", str(run_folder / "llava"), str(merged)]) == 0
    assert main(["convert", "verify", str(merged), "--base", "demo", "--adapter", str(run_folder / "llava")]) == 0
    talk = session.load(str(merged))
    for colour, shape in pictures.names():
        image = session.image(str(DATA / f"pictures/{colour}_{shape}.png"))
        for question in pictures.QUESTIONS:
            said = session.answer(talk, session.question(question, images=[image]), GREEDY)
            assert said == pictures.answer(colour, shape), question
