"""`python -m bench probe`: a row a probe."""

import json

from bench import probe


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "RESULTS", tmp_path)
    for name, value in {"IMAGES": 300, "QUERIES": 50, "WIDTH": 8, "NOISY_SETS": 2}.items():
        monkeypatch.setattr(probe, name, value)
    assert probe.main(["--rounds", "1"]) == 0
    rows = [json.loads(line) for file in tmp_path.glob("*/probe.jsonl") for line in file.read_text().splitlines()]
    protocols = [row["case"]["protocol"] for row in rows]
    assert protocols == ["knn, k = 200", "linear", "linear, 2 sets of labels", "official"]
    assert all(row["p50"] > 0 and row["metric"] == "seconds" and row["case"]["images"] == 300 for row in rows)
    assert capsys.readouterr().out.count(" s on ") == 4
