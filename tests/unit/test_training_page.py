"""report.html: what it shows, that it loads nothing, and that no data can become markup."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

import tiny_run
from fastft.config.schema import Config
from fastft.training import curve, metrics, page

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)> & \x1b[31m\x00 ]]> \u202e ok"


def _config(tmp_path: Path, **changes: object) -> Config:
    return tiny_run.config(tmp_path / "model", tmp_path / "rows.jsonl", **changes)


def _lines() -> list[dict[str, float]]:
    lines = [
        {
            "step": n,
            "epoch": n / 10,
            "loss": 3 / n,
            "lr": 1e-4,
            "grad_norm": 1.0,
            "tokens_per_s": 1234.5,
            "memory_gib": 2.5,
        }
        for n in range(1, 61)
    ]
    return [*lines, {"step": 60, "epoch": 6.0, "eval_loss": 0.1234}]


ANSWERS = [{"step": step, "prompt": "Who?", "answer": f"answer {step}"} for step in range(0, 61, 2)]


def _page(config: Config, answers: list[dict[str, object]] | None = None) -> str:
    record = {"fastft": "1.2.3", "base": {"name": "org/model"}, "versions": {"torch": "9.9"}}
    about = page.About(config, 60, ["train data: 7 samples <b>"], record)
    return page.page(about, _lines(), ANSWERS if answers is None else answers, state="finished")


class _Reader(HTMLParser):
    """Collects elements, attributes and text as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.depth: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.depth.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    text = _page(_config(tmp_path))
    read = _Reader(text)
    assert read.depth == []
    assert not read.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image"}
    for name, value in read.attributes:
        assert name not in {"src", "href", "xlink:href", "srcset", "action", "style"}
        assert not name.startswith("on")
        assert "//" not in str(value)
    assert "url(" not in text
    assert "@import" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in read.attributes


def test_the_newest_numbers_the_settings_and_the_data_are_there(tmp_path: Path) -> None:
    text = " ".join(_Reader(_page(_config(tmp_path))).text)
    for expected in ("0.0500", "0.1234", "1,234", "2.50 GiB", "finished, step 60 of 60", "train data: 7 samples <b>"):
        assert expected in text
    for expected in ("org/model", "torch 9.9", "lr: 0.01", "Who?", "answer 0", "answer 60"):
        assert expected in text
    assert "12 of 31 rounds; all are in samples.jsonl" in text


def test_data_cannot_become_markup(tmp_path: Path) -> None:
    config = _config(tmp_path, name="a<script>b", samples__prompts=(HOSTILE,))
    text = _page(config, [{"step": 1, "prompt": HOSTILE, "answer": HOSTILE}])
    read = _Reader(text)
    assert read.depth == []
    assert not read.tags & {"script", "img"}
    assert "<script>alert(1)</script>" in "".join(read.text)  # shown as text
    assert "\x1b" not in text
    assert "\x00" not in text


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    config = _config(tmp_path, data__train=[{"source": "https://me:secret@host/rows.jsonl"}])
    assert "secret" not in _page(config)
    assert "***@host" in _page(config)


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    path = page.write(tmp_path, page.About(_config(tmp_path), 5, [], {}), state="running")
    assert path == tmp_path / "report.html"
    read = _Reader(path.read_text())
    assert "running, step 0 of 5" in " ".join(read.text)
    assert "svg" not in read.tags


def test_it_is_made_from_the_files_of_the_run(tmp_path: Path) -> None:
    metrics.append(tmp_path / "metrics.jsonl", {"step": 3, "loss": 0.75, "lr": 0.1})
    metrics.append(tmp_path / "samples.jsonl", {"step": 3, "prompt": "p", "answer": "  "})
    text = " ".join(_Reader(page.write(tmp_path, page.About(_config(tmp_path), 5, [], {}), state="x").read_text()).text)
    assert "0.7500" in text
    assert "(nothing)" in text


def _svg(*lines: curve.Line) -> ET.Element:
    text = curve.plot("a & b <c>", lines, "unit <u>")
    assert text is not None
    return ET.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def test_a_line_runs_between_the_grid_lines_of_its_values() -> None:
    root = _svg(curve.Line("l", [(0, 0), (5, 2), (10, 10)]))
    grid = [{k: float(line.attrib[k]) for k in ("x1", "x2", "y1")} for line in root.iter(f"{SVG}line")]
    labels = [text.text for text in root.iter(f"{SVG}text") if text.attrib.get("text-anchor") == "end"]
    assert labels[:6] == ["0", "2", "4", "6", "8", "10"]
    (line,) = root.iter(f"{SVG}polyline")
    points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    assert points[0] == (grid[0]["x1"], grid[0]["y1"])  # 0 at the left end of the line of 0
    assert points[1] == (pytest.approx((grid[0]["x1"] + grid[0]["x2"]) / 2), grid[1]["y1"])  # 5 in the middle, on 2
    assert points[2] == (grid[0]["x2"], grid[5]["y1"])  # 10 at the right end of the line of 10
    assert points[2][1] < points[0][1]  # more is higher
    assert next(text.text for text in root.iter(f"{SVG}text")) == "a & b <c>"


def test_what_is_not_finite_is_left_out() -> None:
    (line,) = _svg(curve.Line("l", [(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0)])).iter(f"{SVG}polyline")
    assert len(line.attrib["points"].split()) == 2
    assert curve.plot("t", [curve.Line("l", [(1, float("nan"))])], "u") is None
    assert curve.plot("t", [], "u") is None


@pytest.mark.parametrize("points", [[(7, 3.0)], [(1, 5.0), (2, 5.0)], [(1, 0.0), (2, 0.0)], [(1, -1e-9), (2, 1e9)]])
def test_flat_and_single_lines_stay_within_the_picture(points: list[tuple[float, float]]) -> None:
    root = _svg(curve.Line("l", points, dots=True))
    for x, y in re.findall(r'c?x="([\d.-]+)" c?y="([\d.-]+)"', ET.tostring(root, encoding="unicode")):
        assert 0 <= float(x) <= curve.WIDTH
        assert 0 <= float(y) <= curve.HEIGHT


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (0.31, 7.4, 5, [0, 2, 4, 6, 8]),
        (1, 150, 8, [0, 20, 40, 60, 80, 100, 120, 140, 160]),
        (0, 0.004, 5, [0, 0.001, 0.002, 0.003, 0.004]),
        (-3, 3, 5, [-4, -2, 0, 2, 4]),
    ],
)
def test_scales_have_round_numbers(low: float, high: float, most: int, expected: list[float]) -> None:
    assert curve.ticks(low, high, most) == pytest.approx(expected)


def test_thinning_keeps_ends_and_peaks() -> None:
    points = [(float(n), 0.0) for n in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[77_777] = (77_777.0, -9.0)
    kept = curve.thinned(points, 1000)
    assert len(kept) <= 1000
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert points[54_321] in kept
    assert points[77_777] in kept
    assert list(kept) == sorted(kept)
