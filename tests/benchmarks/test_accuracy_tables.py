"""The arithmetic of the accuracy tables and targets, from cells that are made up."""

import pytest

pytest.importorskip("psutil", reason="the benchmarks' extra is not installed: pip install '.[bench]'")
pytest.importorskip("sklearn", reason="the benchmarks' extra is not installed: pip install '.[bench]'")

from benchmarks.accuracy import score_tables, store, targets, tasks


def made_up(
    task: str, width: str, method: str, scores: list[float], start: str = "scratch", **more: object
) -> dict[str, object]:
    environment = {"commit": "0" * 40, "date": "2026-01-01", "processor": "a", "torch": "2", "python": "3"}
    seeds = [*range(len(scores))]
    cell = {
        "task": task,
        "start": start,
        "width": width,
        "method": method,
        "unit": tasks.TASKS[task].unit,
        "scores": scores,
    }
    cell |= {"seeds": seeds, "seconds": 1.0, "environment": environment}
    return cell | {"robustness": dict.fromkeys(("0.3", "1", "3"), scores)} | more


def test_the_tables_by_hand(tmp_path):
    ours = made_up(
        "digits-16",
        "binary",
        score_tables.OURS,
        [95.0, 96.0, 97.0],
        robustness={"0.3": [93.0], "1": [96.0], "3": [95.0]},
    )
    peer = made_up("digits-16", "binary", "STE", [93.0, 95.0, 94.0])
    text = [
        made_up("lm-gpt2", "ternary", method, scores)
        for method, scores in ((score_tables.OURS, [1.5, 1.6]), ("STE", [1.55, 1.75]))
    ]
    for cell in (ours, peer, *text):
        store.put(tmp_path, cell)
    found = store.read(tmp_path)
    assert score_tables.gain(ours, peer) == pytest.approx((2.0, 3**-0.5))  # differences 2, 1, 3
    assert score_tables.compared(*text) == "+0.100 ± 0.050"
    rows = score_tables.summary_table(tmp_path, rows=score_tables.REST).splitlines()
    (row,) = (row for row in rows if row.startswith("| digits, MLP 64-16-16-10 | scratch | not run (%)"))
    assert "| 96.00: +2.00 ± 0.58, STE (9 peers not run) | not run (7 peers not run) |" in row
    row = next(
        line
        for line in score_tables.robustness_table(tmp_path).splitlines()
        if line.startswith("| digits-16 | scratch | binary")
    )
    assert row.endswith("| 93.00 | 96.00 | 95.00 | 3.00 |")
    assert "| STE | 94.00 (+2.00 ± 0.58) | not run | not run | not run |" in score_tables.methods_table(tmp_path)
    check = targets.against((("digits-16", "scratch"),), ("binary",), ("STE",), targets.clearly_ahead)
    assert targets.verdict(check(found)) == ("yes: 1 of 1", "")
    with pytest.raises(ValueError, match="--again"):
        score_tables.gain(ours, {**ours, "seeds": [seed + 100 for seed in ours["seeds"]]})
    assert (
        score_tables.gain(
            ours,
            {**ours, "seeds": [*ours["seeds"][1:], 9], "scores": [score - 1 for score in ours["scores"][1:]] + [0]},
        )[0]
        == 1
    )


def test_a_target_tells_what_misses_it_and_what_was_not_run():
    check = targets.Check
    assert targets.verdict([check(True, "a"), check(False, "b -1")]) == ("no: 1 of 2", "b -1")
    assert targets.verdict([check(True, "a"), check(None, "b")]) == ("not run: 1 of 2", "")
    assert targets.verdict([check(True, "a"), check(None, "b"), check(False, "c")]) == ("no: 1 of 3, 1 not run", "c")


def test_a_point_is_a_hundredth_also_in_nats():
    """Of two peers the target asks for the one that the task measures."""
    ours, theirs = (
        made_up("lm-wordnet", "binary", method, scores)
        for method, scores in ((score_tables.OURS, [1.52, 1.52, 1.521]), ("STE", [1.51, 1.51, 1.51]))
    )
    found = {store.key_of(cell): cell for cell in (ours, theirs)}
    check = targets.against((("lm-wordnet", "scratch"),), ("binary",), ("STE", "ProxQuant"), targets.within_a_point)
    assert targets.verdict(check(found)) == ("no: 0 of 1", "lm-wordnet binary against STE -0.010 ± 0.000")
    ours["scores"] = [1.51, 1.52, 1.519]
    assert targets.verdict(check(found)) == ("yes: 1 of 1", "")


def test_nothing_disappears(tmp_path):
    """An empty folder gives the whole tables."""
    rows = (*score_tables.SUMMARY, *score_tables.REST)
    assert sorted(rows) == sorted((task.name, start) for task in tasks.EVERY_TASK for start in task.starts)
    for some in (score_tables.SUMMARY, score_tables.REST):
        text = score_tables.summary_table(tmp_path, rows=some)
        assert text.count("\n| ") == 1 + len(some) <= 13
        assert text.count("| not run (") == 5 * len(some)
    measured = len(rows)
    scores = score_tables.methods_table(tmp_path)
    assert all(scores.count(f"\n| {peer} |") == measured for peer in score_tables.PEERS)
    assert targets.targets_table(tmp_path).count("not run: 0 of") == len(targets.TARGETS)


def test_every_plot_panel_is_there_without_cells(tmp_path):
    assert len(score_tables.gains(tmp_path)) == 2 * len(score_tables.PLOTTED)
