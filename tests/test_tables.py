"""Tables average the finished runs of each experiment, with the same numbers in all formats."""

import csv
import io
import json
import statistics
from pathlib import Path

import pytest
from made import made_run

from mltools.errors import UserError
from mltools.results import RunResult
from mltools.tables import Row, Table, protocols, reference_row, summarise, write_tables


def of(*values):
    return pytest.approx((statistics.mean(values), statistics.stdev(values)))


def test_accuracies_are_means_and_sample_standard_deviations_over_seeds():
    runs = [
        made_run("fc", seed, (10.0 + seed, final), cosines={"act1": [seed / 8, 0.5 + seed / 8]})
        for seed, final in enumerate([40.0, 43.5, 41.25])
    ]
    row = summarise("fc", runs)
    assert row.test == of(40, 43.5, 41.25) and row.train == of(50, 53.5, 51.25)
    assert (row.seeds, row.note) == (3, "")
    assert Table("", [row], ["act1", "act2"]).cells()[0] == [
        "experiment", "test accuracy (%)", "train accuracy (%)", "cos act1", "seeds", "angles from"
    ]  # fmt: skip
    assert row.alignment == {"act1": (0.625, 0.125)} and row.angles_from == "fc/seed-1"
    assert row.settings == {k: v for k, v in runs[0].settings.items() if k != "seed"}
    assert row.curves == {
        "test": {1: of(10, 11, 12), 2: row.test},
        "train": {1: of(20, 21, 22), 2: row.train},
        "act1": {1: of(0, 0.125, 0.25), 2: of(0.5, 0.625, 0.75)},
    }


def test_the_alignment_is_from_the_first_run_with_the_highest_final_train_accuracy():
    runs = [made_run("fc", seed, cosines={"act1": [0, seed / 8]}) for seed in range(4)]
    # Run 0 was better in an earlier epoch, and run 3 is as good as run 2.
    for run, trained in zip(runs, [(99, 50), (40, 60), (40, 70), (40, 70)]):
        for metrics, accuracy in zip(run.epochs, trained):
            metrics |= {"train_accuracy": float(accuracy), "test_accuracy": 100.0 - accuracy}
    row = summarise("fc", runs)
    assert row.alignment == {"act1": (0.25, 0.125)} and row.angles_from == "fc/seed-2"


def test_an_epoch_missing_in_some_runs_is_averaged_over_the_others():
    cosines = [0.1, 0.2, 0.3], [0.3, 0.4, 0.5], [0.5, 0.6, 0.7]
    runs = [made_run(seed=i, test=(1, 2, 3), cosines={"act1": x}) for i, x in enumerate(cosines)]
    del runs[0].epochs[1]  # as from a damaged log
    runs[1].epochs[1]["alignment"]["act1"]["mean"] = None
    found = summarise("fc", runs).curves["act1"]
    assert found == {1: of(0.1, 0.3, 0.5), 2: (0.6, None), 3: of(0.3, 0.5, 0.7)}


def test_unfinished_missing_and_diverged_runs_are_only_counted():
    runs = [
        made_run(seed=0, loss=None),
        made_run(seed=1, epochs=3),
        made_run(seed=2, test=(42.0, 43.0), cosines={"act1": [0.5, None]}),
        RunResult(Path("fc/seed-3")),
    ]
    row = summarise("fc", runs)
    assert row.test == (43.0, None) and row.seeds == 1
    assert row.note == "1 diverged, 2 not finished"
    assert row.alignment == {} and row.angles_from == ""
    assert row.curves["test"] == {1: (42.0, None), 2: (43.0, None)}


def test_runs_with_different_settings_are_not_averaged():
    runs = [made_run(seed=seed, batch_size=8 + seed) for seed in (0, 1)]
    with pytest.raises(UserError, match=r"seed-1 .* settings .*\(batch_size is 8 there, now 9\)"):
        summarise("fc", runs)


@pytest.mark.parametrize("name, place, epochs", [("fc-relu", "seed-0", 2), ("fc", "seed-00", 3)])
def test_a_renamed_folder_is_refused(name, place, epochs):
    run = made_run("fc", 0, epochs=epochs)
    run.path = run.path.with_name(place)
    with pytest.raises(UserError, match=f"{place} holds fc with seed 0: move it where"):
        summarise(name, [run])


def test_a_title_has_each_protocol_once_and_the_precision_if_it_is_not_float32():
    rows = [
        summarise("fc", [made_run(precision=precision)])
        for precision in ("float32", "bf16", "bf16")
    ]
    assert protocols(rows).split("; ") == [
        "tiny, 2 epochs, batch 8, protocol release",
        "tiny, 2 epochs, batch 8, protocol release, bf16",
    ]


def test_a_title_calls_settings_unknown_that_a_log_has_lost():
    row = summarise("fc", [made_run(dataset="unknown", batch_size=None, protocol=None)])
    assert protocols([row]) == "unknown, 2 epochs, batch unknown, protocol unknown"


def test_all_formats_have_the_same_numbers(tmp_path):
    rows = [
        Row("a_b", (40.12345, 1.5), (50.0, None), {"act1": (0.25, 0.0625)}, "a_b/seed-0", 2),
        Row("c,d", (39.0, 2.5), (49.0, 0.5), {"act2": (-0.5, 0.125), "lin1": (0.75, None)},
            "c/seed-0", 3, "1 diverged"),
    ]  # fmt: skip
    markdown = write_tables(tmp_path / "new", [Table("One & two", rows, ["act1", "act2"])])
    assert (tmp_path / "new/table.md").read_text(encoding="utf-8") == markdown
    _, a, c = [line.split("|") for line in markdown.splitlines() if line.startswith("| ")]
    numbers = ["a_b", "40.12 ± 1.50", "50.00", "0.250 ± 0.062", "", "2", "a_b/seed-0", ""]
    assert [cell.strip() for cell in a[1:-1]] == numbers
    assert [cell.strip() for cell in c[1:6]] == [
        "c,d", "39.00 ± 2.50", "49.00 ± 0.50", "", "-0.500 ± 0.125"
    ]  # fmt: skip
    latex = (tmp_path / "new/table.tex").read_text(encoding="utf-8")
    assert r"a\_b & 40.12 $\pm$ 1.50 & 50.00 & 0.250 $\pm$ 0.062 &  & 2" in latex
    assert r"One \& two" in latex and r"accuracy (\%)" in latex
    assert r"\begin{tabular}{lrrrrrr}" in latex and "a\\_b/seed-0" not in latex
    first, second = csv.DictReader(io.StringIO((tmp_path / "new/table.csv").read_text()))
    assert float(first["test_accuracy_mean"]) == 40.12345 and first["train_accuracy_std"] == ""
    assert float(second["act2_mean"]) == -0.5 and second["act1_mean"] == ""
    assert (second["experiment"], second["note"]) == ("c,d", "1 diverged")
    assert (second["lin1_mean"], second["lin1_std"]) == ("0.75", "")  # no table shows lin1


def test_the_csv_contains_the_numbers_of_every_seed(tmp_path):
    runs = [
        made_run(
            "fc", seed, (40.0 + seed,), cosines={"act1": [seed / 8]}, loss=None if seed == 1 else 1
        )
        for seed in range(3)
    ]
    write_tables(tmp_path, [Table("", [summarise("fc", runs), Row("fc, elsewhere")], ["act1"])])
    lines = [*csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))]
    found = [(x["experiment"], x["test_accuracy_mean"], x["act1_mean"], x["seeds"]) for x in lines]
    assert found == [
        ("fc", "41.0", "0.25", "2"),
        ("fc/seed-0", "40.0", "0.0", "1"),
        ("fc/seed-2", "42.0", "0.25", "1"),
        ("fc, elsewhere", "", "", "0"),
    ]


SETTINGS = {"dataset": "tiny", "epochs": 2, "batch_size": 8}


@pytest.mark.parametrize("name, settings, known", [
    ("fc", SETTINGS, True),
    ("cnn", SETTINGS, False),
    ("fc", {**SETTINGS, "dataset": "other"}, False),
    ("fc", {**SETTINGS, "epochs": 3}, False),
    ("fc", {}, False),
])  # fmt: skip
def test_a_reference_row_has_the_same_settings_and_epochs(tmp_path, name, settings, known):
    run = {"settings": {"dataset": "tiny"}, "epochs": [1, 2], "test": [30, 31], "train": [40, 41]}
    run |= {"layers": ["act1"], "mean": [[0.1], [0.2]], "std": [[0.01], [0.02]]}
    (tmp_path / "reference.json").write_text(json.dumps({"runs": {"fc": run}}))
    found = reference_row(Row(name, settings=settings), tmp_path / "reference.json", "elsewhere")
    expected = Row("fc, elsewhere", (31, None), (41, None), {"act1": (0.2, 0.02)}, "elsewhere", 1)
    assert found == [expected] * known
