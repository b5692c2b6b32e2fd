"""`python -m bench augment` on a CPU: what it measures, prints and refuses."""

import pytest

from bench import augment
from bench.rows import ROW_KEYS


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(augment, "QUICK_SECONDS", 0.05)
    monkeypatch.setattr(augment, "ROUND_SECONDS", 0.05)
    monkeypatch.setattr(augment, "IMAGES", 200)


@pytest.mark.slow
def test_the_command_measures_backends_and_loaders(short, monkeypatch, capsys):
    rows = []
    monkeypatch.setattr(augment, "append_rows", lambda found, path: rows.extend(found))
    assert augment.main(["--quick", "--batches", "16"]) == 0
    found = {(row.case["mode"], row.provider, row.metric) for row in rows}
    wanted = {(augment.LOADER, name, "images_per_s") for name in ("resident", "torchvision")}
    assert wanted | {(augment.CALL, name, "ms") for name in ("native", "torch")} <= found
    assert all(set(ROW_KEYS) == set(vars(row)) and row.p20 <= row.p50 <= row.p80 for row in rows)
    assert all(row.case["batch"] == 16 and row.case["size"] == 32 and row.case["views"] == 4 for row in rows)
    printed = capsys.readouterr().out
    assert "4 views of each image on" in printed and "resident" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sides", "48"], "argument --sides: 48 is not allowed; allowed: 32, 96"),
        (["--batches", "0"], "argument --batches: 0 is not allowed; allowed: 1 to 2000"),
        (["--batches", "20000"], "argument --batches: 20000 is not allowed"),
    ],
)
def test_what_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        augment.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
