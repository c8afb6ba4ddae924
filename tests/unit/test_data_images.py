"""Images that rows name: every form in which they stand in a row, and every way in which one cannot be used."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastft.data import formats, images, sources
from fastft.data.dialogue import IMAGE_MARK, Dialogue, ImageRef, Where
from fastft.data.images import BadImageError, Folder

WHERE = Where("rows.json", 3)


def _read(row: Any, folder: Path, *, configured: bool = True, task: str = "sft", **given: Any) -> Dialogue:
    chosen = formats.recognise([row], task, "rows.json") if "columns" not in given else "columns"
    read = formats.reader(chosen, given.get("columns"), None, task, Folder(folder, configured))
    found = read(row, WHERE)
    assert isinstance(found, Dialogue)
    return found


def _shown(dialogue: Dialogue) -> list[str]:
    """The turns with [NAME] for each image."""
    turns = []
    for message in dialogue.messages:
        text = message.content
        for ref in message.images:
            text = text.replace(IMAGE_MARK, f"[{ref.name}]", 1)
        turns.append(text)
    assert not any(IMAGE_MARK in turn for turn in turns)
    return turns


def _png(size: tuple[int, int] = (4, 3), colour: Any = (10, 200, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


# Forms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (  # LLaVA; the line break belongs to the mark
            {
                "image": "a.png",
                "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "I."}],
            },
            ["[a.png]Who?", "I."],
        ),
        (  # LLaVA, mark at the end, two images in two turns
            {
                "image": ["a.png", "b.png"],
                "conversations": [
                    {"from": "human", "value": "Who?\n<image>"},
                    {"from": "gpt", "value": "I."},
                    {"from": "human", "value": "And <image> here?"},
                    {"from": "gpt", "value": "You."},
                ],
            },
            ["Who?[a.png]", "I.", "And [b.png] here?", "You."],
        ),
        (  # sharegpt with images of LLaMA-Factory
            {
                "images": ["a.png"],
                "messages": [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "I."}],
            },
            ["[a.png]Who?", "I."],
        ),
        (  # no mark anywhere: before the first question
            {
                "images": ["a.png", "b.png"],
                "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}],
            },
            ["[a.png][b.png]Who?", "I."],
        ),
        (  # OpenAI parts
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "Compare "},
                            {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
                            {"type": "text", "text": " with "},
                            {"type": "image", "image": "b.png"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "Equal."}]},
                ]
            },
            ["Compare [a.png] with [b.png]", "Equal."],
        ),
        (  # parts without a name take the images of the row's column
            {
                "images": ["a.png"],
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]},
                    {"role": "assistant", "content": "I."},
                ],
            },
            ["[a.png]Who?", "I."],
        ),
        (  # LLaMA-Factory 1: value
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "value": "a.png"}, {"type": "text", "value": "Who?"}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "value": "I."}]},
                ]
            },
            ["[a.png]Who?", "I."],
        ),
        (  # XTuner 1: parts first, marks in the text
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "a.png", "image_wh": [4, 3]}},
                            {"type": "image_url", "image_url": {"url": "b.png", "image_wh": [4, 3]}},
                            {"type": "text", "text": "<IMG_CONTEXT>\n<IMG_CONTEXT>\nEqual?"},
                        ],
                    },
                    {"role": "assistant", "content": "No."},
                ]
            },
            ["[a.png][b.png]Equal?", "No."],
        ),
        (  # ms-swift: query and response, marks or <img>
            {"query": "<img>a.png</img>Who?", "response": "I.", "history": [["Hello", "Hi"]]},
            ["Hello", "Hi", "[a.png]Who?", "I."],
        ),
        ({"query": "Who?", "response": "I.", "images": ["a.png"]}, ["[a.png]Who?", "I."]),
        ({"instruction": "Who?", "output": "I.", "image": "a.png"}, ["[a.png]Who?", "I."]),
        (  # text among images
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]},
            ["Who?", "I."],
        ),
        (  # as parquet files of a hub hold them
            {
                "image": {"bytes": _png(), "path": "a.png"},
                "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "I."}],
            },
            ["[a.png]Who?", "I."],
        ),
    ],
)
def test_forms(tmp_path: Path, row: Any, turns: list[str]) -> None:
    assert _shown(_read(row, tmp_path)) == turns


def test_a_data_uri_is_its_bytes(tmp_path: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode(_png()).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "Who?"}]
    dialogue = _read([{"role": "user", "content": content}, {"role": "assistant", "content": "I."}], tmp_path)
    assert dialogue.images[0].content == _png()
    assert images.examine(dialogue.images[0], 100) == (4, 3)
    assert uri not in repr(dialogue), "bytes stay out of messages"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"image": ["a.png", "b.png"]}, "1 image marks, the row has 2 images"),
        ({"image": None}, "1 image marks, the row has 0 images"),
        ({"image": 7}, "an image is int, not a path"),
        ({"image": {"height": 3}}, "neither path, url nor bytes"),
        ({"image": "http://example.org/a.png"}, "nothing is fetched from the net; download it"),
        ({"image": "../a.png"}, "the path leaves the image folder"),
        ({"image": "/etc/hostname"}, "the path leaves the image folder"),
        ({"image": "b/../../a.png"}, "the path leaves the image folder"),
        ({"image": "a\0.png"}, "zero byte"),
        ({"image": "data:image/png;base64,@@@@"}, "broken base64"),
        ({"image": "data:image/png,plain"}, "without base64"),
        ({"video": "a.mp4"}, "the row has video; only text can be learned"),
    ],
)
def test_rows_that_name_no_usable_image(tmp_path: Path, changes: Any, complaint: str) -> None:
    row = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "I."}],
    }
    with pytest.raises((BadImageError, formats.BadRowError), match=complaint):
        _read({**row, **changes}, tmp_path)


def test_an_image_of_the_assistant_is_refused(tmp_path: Path) -> None:
    row = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "Draw."}, {"from": "gpt", "value": "<image>"}],
    }
    with pytest.raises(BadImageError, match="turn of the assistant"):
        _read(row, tmp_path)


def test_without_a_configured_folder_absolute_paths_may_stand_anywhere(tmp_path: Path) -> None:
    row = {"image": "/elsewhere/a.png", "query": "Who?", "response": "I."}
    assert _read(row, tmp_path, configured=False).images[0].path == "/elsewhere/a.png"
    with pytest.raises(BadImageError, match="set `images` of the source"):
        _read({**row, "image": "../a.png"}, tmp_path, configured=False)


def test_where_only_text_can_be_learned_rows_with_images_are_refused() -> None:
    read = formats.reader("alpaca", None, None, "sft")
    with pytest.raises(formats.BadRowError, match="with `vision` in the config"):
        read({"query": "Who?", "response": "I.", "images": ["a.png"]}, WHERE)


# Files ----------------------------------------------------------------------------------------------------------------


def _ref(path: Path) -> ImageRef:
    return ImageRef(str(path), None, path.name)


def _jpeg(**settings: Any) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", **settings)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "the file is empty"),
        (b"%PDF-1.7 ...", "a PDF"),
        (b"<!doctype html><html>404</html>", "a web page"),
        (b"\n <HTML>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git LFS"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"\x80\x04\x95", "a pickle"),
        (b"hello", "no image that can be read"),
        (_png((64, 64))[:-30], "broken or cut off"),
        (_jpeg()[:-500], "broken or cut off"),
        (_png()[:20], "broken|no image"),
        (_png()[:40] + b"\xff" * 20 + _png()[60:], "broken"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that can be read"),
    ],
)
def test_files_that_are_no_image(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for look in (images.examine, images.read):
        with pytest.raises(BadImageError, match=complaint) as caught:
            look(_ref(path), 10**6)
        assert "a.png" in str(caught.value)


def test_places_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="no such file"):
        images.examine(_ref(tmp_path / "missing.png"), 10**6)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadImageError, match="a folder"):
        images.examine(_ref(tmp_path / "folder.png"), 10**6)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadImageError, match="no regular file"):
        images.examine(_ref(tmp_path / "pipe.png"), 10**6)


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(path)
    assert path.stat().st_size < 200_000
    with pytest.raises(BadImageError, match="more than twice the pixels of vision.max_image_pixels"):
        images.examine(_ref(path), 100_000_000)
    with pytest.raises(BadImageError, match=r"more than vision.max_image_pixels \(11\)"):
        images.examine(ImageRef(None, _png(), "small"), 11)


def test_a_jpeg_is_read_as_the_camera_held_it(tmp_path: Path) -> None:
    upright = Image.new("RGB", (40, 20), "red")
    upright.paste("blue", (0, 0, 20, 20))  # blue at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left side comes to the top
    upright.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert images.examine(_ref(tmp_path / "a.jpg"), 10**6) == (20, 40)
    picture = images.read(_ref(tmp_path / "a.jpg"), 10**6)
    assert picture.size == (20, 40)
    assert picture.getpixel((10, 5))[2] > 200
    assert picture.getpixel((10, 35))[0] > 200


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("LA", (10, 0), (255, 255, 255)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32768, (127, 127, 127)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, colour: Any, rgb: tuple[int, int, int]) -> None:
    path = tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}"
    Image.new(mode, (4, 3), colour).save(path)
    picture = images.read(_ref(path), 10**6)
    assert (picture.mode, picture.size) == ("RGB", (4, 3))
    assert picture.getpixel((2, 1)) == rgb


def test_a_palette_with_a_transparent_colour_is_white_there(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    picture = images.read(_ref(tmp_path / "a.png"), 10**6)
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


# Real rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "rows", "shown"),
    [
        ("multimodal/mllm_demo.json", 6, 8),
        ("multimodal/llava_format_demo.json", 15, 14),
        ("multimodal/llamafactory_v1_multimodal_demo.jsonl", None, None),
        ("multimodal/mllm_sft_single_image_example_data.jsonl", None, None),
        ("multimodal/mllm_sft_multi_image_example_data.jsonl", None, None),
    ],
)
def test_real_rows(shared_data: Path, tmp_path: Path, file: str, rows: int | None, shown: int | None) -> None:
    folder = shared_data / "multimodal"
    if "llamafactory" in file:
        (tmp_path / "data").symlink_to(folder)
        folder = tmp_path
    count = num_images = 0
    known: Any = None
    for row in sources.rows(shared_data / file):
        known = known or formats.recognise([row.value], "sft", file)
        dialogue = formats.reader(known, None, None, "sft", Folder(folder, configured=True))(row.value, row.where)
        assert isinstance(dialogue, Dialogue)
        for ref in dialogue.images:
            width, height = images.examine(ref, 10**8)
            assert images.read(ref, 10**8).size == (width, height)
            num_images += 1
        count += 1
    assert count == rows or (rows is None and count > 3)
    assert num_images == shown or (shown is None and num_images > 3)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_real_rows_with_urls_say_what_to_do(shared_data: Path, number: int) -> None:
    file = shared_data / "instruction" / "ms_swift_formats" / f"multi_modal_{number}.jsonl"
    first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    with pytest.raises(BadImageError, match=r"image https://\S+: nothing is fetched from the net"):
        _read(first, shared_data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_ways_to_hold_a_camera_are_pillows(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    noise = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise).save(tmp_path / "a.png", exif=exif)
    picture = images.read(_ref(tmp_path / "a.png"), 10**6)
    assert np.array_equal(picture, ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    assert images.examine(_ref(tmp_path / "a.png"), 10**6) == picture.size


def test_a_broken_exif_block_spoils_no_picture(tmp_path: Path) -> None:
    Image.new("RGB", (5, 4)).save(tmp_path / "a.jpg", exif=b"Exif\0\0nonsense")
    assert (
        images.read(_ref(tmp_path / "a.jpg"), 10**6).size == images.examine(_ref(tmp_path / "a.jpg"), 10**6) == (5, 4)
    )


# Bytes in rows --------------------------------------------------------------------------------------------------------


def test_bytes_of_rows_wait_on_the_disk(tmp_path: Path) -> None:
    from fastft.data.spool import Spool

    kept = Spool(tmp_path / "new")
    refs = [ImageRef(None, _png((n + 1, 2), (n, 0, 0)), f"{n}") for n in range(5)]
    stored = [kept.keep(ref) for ref in refs]
    assert all(ref.content is None for ref in stored)
    assert len({ref.digest for ref in stored}) == 5
    assert kept.keep(refs[2]).digest == stored[2].digest
    for ref, place in reversed(list(zip(refs, stored, strict=True))):
        assert kept.content(place).content == ref.content
    assert list((tmp_path / "new").iterdir()) == [], "the file has no name, and goes with the process"


def test_a_hub_data_set_gives_bytes_not_pictures(tmp_path: Path) -> None:
    import datasets

    broken = _png((64, 64))[:-30]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": broken, "path": None}], "images": [[{"bytes": _png(), "path": "b.png"}]], "text": ["I."]},
        features=datasets.Features(
            {"image": datasets.Image(), "images": datasets.List(datasets.Image()), "text": datasets.Value("string")}
        ),
    )
    (row,) = sources.table_rows(sources.undecoded(table), "acme/pictures")
    assert row.value["image"]["bytes"] == broken
    assert row.value["images"][0]["bytes"] == _png()
    ref = images.reference(row.value["image"], Folder(tmp_path, configured=False), row.where)
    with pytest.raises(BadImageError, match="image in the row: broken or cut off"):
        images.examine(ref, 10**6)
