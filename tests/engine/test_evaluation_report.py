"""Reports of evaluations: what is written reads back, tables hold every score, and pictures show its numbers."""

import json
import statistics
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from engine import evaluation_report
from engine.evaluation import Score

PEERS = (("a", "wrn-10-1"), ("b", "mobilenetv3_small_050"), ("c", "vit_tiny_patch16_224"))
SETTINGS = {
    "knn": ["k=20"],
    "linear": [""],
    "official": [""],
    "few": ["1%", "10%", "50%"],
    "noisy": ["human aggregate", "symmetric 20%", "symmetric 80%", "pairflip 40%"],
    "ood": ["my [new] photos"],
    "transfer": ["stl10"],
    "corruptions": ["fog", "severity 1", "all weather", "mean", "severity 5"],
}
DRAWS = {"knn": 1, "few": 2, "corruptions": 4}  # of the others 3


def made(peers=PEERS[:2], protocols=tuple(SETTINGS)) -> list[Score]:
    """Scores that all differ."""
    rng = np.random.default_rng(0)
    return [
        Score(peer, backbone, protocol, setting, tuple(rng.uniform(0.1, 0.9, DRAWS.get(protocol, 3)).tolist()),
              train=1000 + i, test=12_345)
        for peer, backbone in peers
        for protocol in protocols
        for i, setting in enumerate(SETTINGS[protocol])
    ]  # fmt: skip


def expected_cell(score: Score) -> str:
    mean = f"{100 * sum(score.values) / len(score.values):.1f}%"
    return mean if len(score.values) == 1 else f"{mean} ± {100 * statistics.stdev(score.values):.1f}"


def test_mean_and_deviation_are_over_the_draws():
    for score in made():
        n = len(score.values)
        mean = sum(score.values) / n
        assert score.mean == pytest.approx(mean, rel=1e-12)
        if n == 1:
            assert score.std is None
        else:
            spread = (sum((value - mean) ** 2 for value in score.values) / (n - 1)) ** 0.5
            assert score.std == pytest.approx(spread, rel=1e-9)


def test_what_is_written_reads_back(tmp_path):
    scores, facts = made(), {"settings": {"knn": {"k": 20}, "few": {"shares": [0.1]}}, "torch": "2.0"}
    files = evaluation_report.write(tmp_path / "deep" / "er", scores, facts)
    assert all(file.exists() and file.parent == tmp_path / "deep" / "er" for file in files)
    assert [file.name for file in files[:2]] == ["scores.json", "scores.md"]
    assert evaluation_report.read(files[0]) == (scores, facts)
    plain = json.loads(files[0].read_text())["scores"]
    assert [(row["mean"], row["std"]) for row in plain] == [(s.mean, s.std) for s in scores]
    assert files[1].read_text() == evaluation_report.as_markdown(scores)


def test_a_second_report_takes_the_place_of_the_first(tmp_path):
    evaluation_report.write(tmp_path, made(), {"old": 1})
    evaluation_report.write(tmp_path, made()[:3], {})
    assert evaluation_report.read(tmp_path / "scores.json") == (made()[:3], {})


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_line_each_setting_and_a_column_each_peer(count):
    scores = made(PEERS[:count])
    header, rule, *lines = table(evaluation_report.as_markdown(scores))
    columns = [f"{peer} ({backbone})" for peer, backbone in PEERS[:count]]
    assert header == ["protocol", "setting", "trained on", "tested on", "draws", *columns]
    assert rule == ["---", "---", *["---:"] * (3 + count)]
    one_peers = [score for score in scores if score.peer == "a"]
    for line, first in zip(lines, one_peers, strict=True):
        of_peers = [s for s in scores if (s.protocol, s.setting) == (first.protocol, first.setting)]
        assert line == [
            first.protocol, first.setting, f"{first.train:,}", "12,345", str(len(first.values)),
            *map(expected_cell, of_peers),
        ]  # fmt: skip


def test_a_score_that_one_peer_lacks_is_a_dash():
    scores = [s for s in made() if (s.peer, s.setting) not in {("a", "10%"), ("b", "k=20")}]
    lines = {tuple(line[:2]): line for line in table(evaluation_report.as_markdown(scores))}
    (only_b,) = (s for s in scores if s.setting == "10%")
    (only_a,) = (s for s in scores if s.setting == "k=20")
    assert lines["few", "10%"][2:] == ["1,001", "12,345", "2", "-", expected_cell(only_b)]
    assert lines["knn", "k=20"][-2:] == [expected_cell(only_a), "-"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_score_is_shown_whole(count, capsys):
    """However many peers: nothing is cut off, and names are no markup."""
    scores = made(PEERS[:count])
    evaluation_report.show(scores)
    lines = [line.replace("┃", "│") for line in capsys.readouterr().out.splitlines()]
    shown = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    header, _, *expected = table(evaluation_report.as_markdown(scores))
    assert shown == [header, *expected]
    assert ["ood", "my [new] photos"] in [line[:2] for line in shown]


@pytest.mark.parametrize(
    ("protocols", "pictures"),
    [
        (("few",), {"few.png"}),
        (("noisy",), {"noisy.png"}),
        (("corruptions",), {"corruptions.png"}),
        (("ood", "transfer"), {"scores.png"}),
        (("official", "few"), {"few.png", "scores.png"}),
        (tuple(SETTINGS), {"few.png", "noisy.png", "corruptions.png", "scores.png"}),
    ],
)
def test_a_picture_each_protocol_that_has_a_course_and_one_of_the_rest(tmp_path, protocols, pictures):
    files = evaluation_report.draw(tmp_path, made(protocols=protocols))
    assert {file.name for file in files} == pictures == {file.name for file in tmp_path.iterdir()}
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 1


@pytest.fixture
def axes(monkeypatch) -> dict:
    """The axes of every picture that is saved, by the picture's name."""
    found, save = {}, Figure.savefig

    def saved(figure, path, **options):
        (found[path.name],) = figure.axes
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return found


def drawn(axis) -> dict[str, list[tuple[float, float, float]]]:
    """Of each line with error bars: label -> [(x, mean, half the bar)]."""
    found = {}
    for container in axis.containers:
        line, _, (bars,) = container.lines
        ends = [(low[1], high[1]) for low, high in bars.get_segments()]
        halves = [(high - low) / 2 for low, high in ends]
        found[container.get_label()] = list(zip(*line.get_data(), halves, strict=True))
    return found


def points(scores, peer, protocol, settings) -> list[tuple[float, float, float]]:
    """What a line has to show: percent of each score at a place."""
    own = {s.setting: s for s in scores if (s.peer, s.protocol) == (peer, protocol)}
    return [(x, 100 * own[name].mean, 100 * (own[name].std or 0)) for name, x in settings.items()]


def same(found, expected) -> bool:
    return np.allclose(np.array(found), np.array(expected), rtol=1e-9)


def test_lines_are_at_the_scores_with_bars_of_a_deviation(tmp_path, axes):
    scores = made()
    evaluation_report.draw(tmp_path, scores)
    few, noisy, corruptions = (drawn(axes[f"{name}.png"]) for name in ("few", "noisy", "corruptions"))
    assert len(few) == len(corruptions) == 2 and len(noisy) == 4
    for peer, backbone in PEERS[:2]:
        label = f"{peer} ({backbone})"
        assert same(few[label], points(scores, peer, "few", {"1%": 1, "10%": 10, "50%": 50}))
        symmetric = {"symmetric 20%": 20, "symmetric 80%": 80}
        assert same(noisy[f"{label}, symmetric"], points(scores, peer, "noisy", symmetric))
        assert same(noisy[f"{label}, pairflip"], points(scores, peer, "noisy", {"pairflip 40%": 40}))
        severities = {"severity 1": 1, "severity 5": 5}
        assert same(corruptions[label], points(scores, peer, "corruptions", severities))
    for axis in (axes["few.png"], axes["noisy.png"], axes["corruptions.png"]):
        assert axis.get_legend() is not None and axis.get_ylabel() == "accuracy, %"


def test_bars_stand_at_their_names(tmp_path, axes):
    scores = [s for s in made(PEERS) if (s.peer, s.protocol) != ("b", "linear")]
    evaluation_report.draw(tmp_path, scores)
    axis = axes["scores.png"]
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names == ["knn k=20", "linear", "official", "ood my [new] photos", "transfer stl10"]
    bars = [bar for bar in axis.patches if bar.get_width() > 0]
    ticks = axis.get_yticks()
    nearest = [names[int(np.abs(ticks - (bar.get_y() + bar.get_height() / 2)).argmin())] for bar in bars]
    rest = [s for s in scores if s.protocol not in ("few", "noisy", "corruptions")]
    assert nearest == [f"{s.protocol} {s.setting}".strip() for s in rest]
    assert np.allclose([bar.get_width() for bar in bars], [100 * s.mean for s in rest])
    edges = sorted((round(bar.get_y(), 6), round(bar.get_y() + bar.get_height(), 6)) for bar in bars)
    assert all(one[1] <= other[0] for one, other in zip(edges, edges[1:], strict=False)), "none covers another"


def test_labels_by_people_have_their_names_inside_the_picture(tmp_path, axes):
    """Also where no other noise was asked for, and so no line has a legend."""
    for scores in (made(protocols=("noisy",)), [s for s in made() if s.setting == "human aggregate"]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluation_report.draw(tmp_path, scores)
        axis = axes["noisy.png"]
        frame = axis.get_window_extent()
        human = [s for s in scores if s.setting == "human aggregate"]
        assert [text.get_text() for text in axis.texts] == [f"human aggregate, {s.peer}" for s in human]
        for text, score in zip(axis.texts, human, strict=True):
            x, y = text.get_window_extent().min
            height = axis.transData.transform((0, 100 * score.mean))[1]
            assert frame.x0 <= x < frame.x1 and abs(y - height) < 10, "beside its line"
