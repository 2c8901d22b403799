"""Tables: the right means, nothing wrong in them, the same numbers in all three forms."""

import csv
import io
import json

import numpy as np
import pytest

from mltools.errors import UserError
from mltools.results import RunFolder
from mltools.tables import Row, Table, protocols, reference_row, summarise, write_tables

SETTINGS = {"dataset": "tiny", "epochs": 2, "batch_size": 8, "feedback_placement": "release"}


def run(path, test, train, cosine=0.5, epochs=2, **settings):
    """A run's folder as a script leaves it; `test` None: it diverged."""
    folder = RunFolder(path)
    folder.start({**SETTINGS, "seed": int(path.name.split("-")[1]), **settings}, {})
    folder.write_metrics(
        [
            {
                "epoch": epoch,
                "train_loss": 1.0 if test is not None else None,
                "train_accuracy": train,
                "test_loss": 1.0,
                "test_accuracy": test,
                "alignment": {"act1": {"mean": cosine, "std": 0.1}},
            }
            for epoch in range(1, epochs + 1)
        ]
    )
    return folder


def test_accuracies_are_means_and_sample_standard_deviations_over_seeds(tmp_path):
    tests, trains = [40.0, 43.5, 41.25], [50.0, 49.0, 53.0]
    folders = [
        run(tmp_path / f"seed-{i}", test, train, cosine=0.5 + i / 10)
        for i, (test, train) in enumerate(zip(tests, trains))
    ]
    row = summarise("fc", folders)
    assert row.test == pytest.approx((np.mean(tests), np.std(tests, ddof=1)))
    assert row.train == pytest.approx((np.mean(trains), np.std(trains, ddof=1)))
    assert row.seeds == 3 and row.note == ""
    assert row.alignment == {"act1": (0.5, 0.1)} and row.angles_from == "fc/seed-0"


def test_one_seed_has_no_standard_deviation(tmp_path):
    row = summarise("fc", [run(tmp_path / "seed-0", 40.0, 50.0)])
    assert row.test == (40.0, None)
    assert Table("t", [row], ["act1"]).cells()[1][1] == "40.00"


def test_unfinished_missing_and_diverged_runs_are_left_out_and_noted(tmp_path):
    folders = [
        run(tmp_path / "seed-0", None, 10.0, epochs=1),
        run(tmp_path / "seed-1", 40.0, 50.0, epochs=1),
        run(tmp_path / "seed-2", 42.0, 52.0),
        RunFolder(tmp_path / "seed-3"),
    ]
    row = summarise("fc", folders)
    assert row.test == (42.0, None) and row.seeds == 1
    assert row.note == "1 diverged, 2 not finished"
    assert row.angles_from == "fc/seed-2"


def test_a_row_without_a_finished_run_shows_no_number():
    row = summarise("fc", [RunFolder("nowhere/seed-0")])
    assert row.test is None and row.note == "1 not finished"
    assert protocols([row]) == "no finished run"


def test_runs_of_different_settings_do_not_share_a_row(tmp_path):
    folders = [
        run(tmp_path / "seed-0", 40.0, 50.0),
        run(tmp_path / "seed-1", 40.0, 50.0, batch_size=16),
    ]
    with pytest.raises(UserError, match="seed-1 was run with other settings"):
        summarise("fc", folders)


def test_how_settings_differ_is_said(tmp_path):
    folders = [run(tmp_path / f"seed-{i}", 40.0, 50.0, batch_size=8 + i) for i in (0, 1)]
    with pytest.raises(UserError, match=r"\(batch_size is 8 there, now 9\)"):
        summarise("fc", folders)


@pytest.mark.parametrize("name, place", [
    ("fc-relu", "seed-0"), ("fc", "seed-1"), ("fc", "seed-00"), ("fc", "seed-0-copy")
])  # fmt: skip
def test_a_folder_that_was_renamed_is_refused(tmp_path, name, place):
    folder = run(tmp_path / "seed-0", 40.0, 50.0, experiment={"name": "fc"})
    assert summarise("fc", [folder]).seeds == 1
    moved = RunFolder(folder.path.rename(tmp_path / place))
    refused = pytest.raises(UserError, match=f"{place} holds fc with seed 0: move it where it")
    with refused:
        summarise(name, [moved])
    moved.write_metrics(moved.metrics()[:1])  # not finished
    with refused:
        summarise(name, [moved])


def test_a_title_says_the_precision_unless_it_is_the_papers(tmp_path):
    rows = [
        summarise("fc", [run(tmp_path / precision / "seed-0", 40.0, 50.0, precision=precision)])
        for precision in ("float32", "bf16")
    ]
    first, second = protocols(rows).split("; ")
    assert "float32" not in first and second == f"{first}, bf16"


def test_the_three_forms_hold_the_same_numbers(tmp_path):
    rows = [
        Row("a_b", (40.12345, 1.5), (50.0, None), {"act1": (0.25, 0.0625)}, "a_b/seed-0", 2),
        Row("c", (39.0, 2.5), (49.0, 0.5), {"act2": (-0.5, 0.125)}, "c/seed-0", 3, "1 diverged"),
    ]
    markdown = write_tables(tmp_path, [Table("One & two", rows, ["act1", "act2"])])
    assert (tmp_path / "table.md").read_text() == markdown
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("| ")
    ]
    assert lines[1][:5] == ["a_b", "40.12 ± 1.50", "50.00", "0.250 ± 0.062", ""]
    assert lines[2][:5] == ["c", "39.00 ± 2.50", "49.00 ± 0.50", "", "-0.500 ± 0.125"]
    latex = (tmp_path / "table.tex").read_text()
    assert r"a\_b & 40.12 $\pm$ 1.50 & 50.00 & 0.250 $\pm$ 0.062 &  & 2" in latex
    assert r"One \& two" in latex and r"accuracy (\%)" in latex
    first, second = csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert float(first["test_accuracy_mean"]) == 40.12345 and first["train_accuracy_std"] == ""
    assert float(second["act2_mean"]) == -0.5 and second["act1_mean"] == ""
    assert second["note"] == "1 diverged"


def test_a_reference_stands_beside_a_row_of_the_same_settings_and_epochs_only(tmp_path):
    path = tmp_path / "reference.json"
    known = {"settings": {"dataset": "tiny"}, "epochs": [1, 2], "test": [30, 31], "train": [40, 41]}
    cosines = {"layers": ["act1"], "mean": [[0.1], [0.2]], "std": [[0.01], [0.02]]}
    path.write_text(json.dumps({"runs": {"fc": {**known, **cosines}}}))
    row = Row("fc", (1.0, None), settings=SETTINGS)
    (found,) = reference_row(row, path, "elsewhere")
    assert (found.name, found.test, found.train) == ("fc, elsewhere", (31, None), (41, None))
    assert found.alignment == {"act1": (0.2, 0.02)}
    for other in (
        Row("cnn", settings=SETTINGS),
        Row("fc", settings={**SETTINGS, "dataset": "other"}),
        Row("fc", settings={**SETTINGS, "epochs": 3}),
        Row("fc"),
    ):
        assert reference_row(other, path, "elsewhere") == []
