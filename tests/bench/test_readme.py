"""The README's tables are those of the measured rows."""

import json

import pytest

from bench import readme
from bench.rows import RESULTS


def test_the_readme_says_what_was_measured():
    text = readme.README.read_text()
    assert readme.filled(text) == text, "python -m bench readme"
    assert all(f"<!-- table {name} -->" in text for name in readme.TABLES)


def test_ratios_are_of_one_run(tmp_path, monkeypatch):
    """Older rows are faster here: none of theirs may come into the table."""
    rows = [json.loads(line) for line in (RESULTS / "cpu" / "loss.jsonl").read_text().splitlines()]
    case = {"loss": "mutual", "M": 64, "D": 128, "mode": "forward+backward"}
    times = {("native", "ms"): 2.0, ("torch", "ms"): 7.0, ("native", "bytes"): 2**20, ("torch", "bytes"): 60 * 2**20}
    made = [
        {**rows[0], "case": case, "provider": name, "metric": metric, "p50": value * factor, "commit": commit}
        for commit, factor in (("old", 0.1), ("new", 1))
        for (name, metric), value in times.items()
    ]
    made.insert(0, {**made[0], "case": {**case, "M": 32}})
    folder = tmp_path / "cpu"
    folder.mkdir()
    (folder / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    lines = readme.loss_cpu().splitlines()
    assert lines[2] == "| 32 | 2 ms | 7 ms | 3.5x | 1 MiB | 60 MiB | 60x |"
    assert len(lines) == 5
    assert "commit new" in lines[-1]


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        readme.filled("<!-- table nothing -->\n<!-- end -->")
