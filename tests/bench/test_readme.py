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


def test_rows_of_steps_from_before_are_read_in_todays_terms(tmp_path, monkeypatch):
    """`reference` was the name of `plain`; what no table of small images has are photos and several ranks."""
    old = json.loads((RESULTS / "h200" / "step.jsonl").read_text().splitlines()[0])
    case = {"pair": "a+b", "batch": 8, "size": 32, "views": 4, "precision": "bf16"}
    new = {**case, "data": "real", "ranks": 1}
    made = [
        {**old, "case": of, "provider": name, "metric": metric, "p50": value, "commit": commit}
        for commit, of, name, metric, value in (
            ("first", case, "captured", "images_per_s", 800.0),
            ("first", case, "reference", "images_per_s", 100.0),
            ("second", new, "captured", "images_per_s", 900.0),
            ("second", new, "captured", "mfu", 0.5),
            ("second", new, "plain", "images_per_s", 300.0),
            ("second", new, "tuned", "images_per_s", 600.0),
            ("second", {**new, "data": "synthetic"}, "plain", "images_per_s", 1.0),
            ("second", {**new, "size": 224}, "plain", "images_per_s", 2.0),
            ("second", {**new, "ranks": 2}, "plain", "images_per_s", 3.0),
        )
    ]
    (tmp_path / "h200").mkdir()
    file = tmp_path / "h200" / "step.jsonl"
    monkeypatch.setattr(readme, "RESULTS", tmp_path)

    def table(rows) -> list[str]:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [line for line in readme.step("h200").splitlines() if line.startswith("|")]

    assert table(made[:2])[0] == "| pair | batch | data | `captured` | `plain` | `captured` over `plain` |"
    assert table(made[:2])[2:] == ["| `a+b` | 8 | real | 800 | 100 | 8.00x |"]
    assert table(made)[2:] == [
        "| `a+b` | 8 | real | 900 | 300 | 600 | 3.00x | 1.50x |", "| `a+b` | 8 | synthetic | - | 1 | - | - | - |",
    ], "the newer run alone"  # fmt: skip


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        readme.filled("<!-- table nothing -->\n<!-- end -->")
