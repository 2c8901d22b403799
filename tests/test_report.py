"""report.html is one self-contained file with all results, and links only to the runs."""

import base64
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from made import made_run, save_run

from mltools.figures import Figure
from mltools.report import write_report
from mltools.results import RunFolder, RunResult
from mltools.tables import Row, Table

HOSTILE = "<b>&\"'x"
RUNS = "Every run, after its last epoch so far"


def parse(folder):
    """Parses the page, which is valid XML; returns its root, and its tables by caption."""
    root = ElementTree.fromstring((folder / "report.html").read_text(encoding="utf-8"))
    tables = {
        table.findtext("caption"): [["".join(c.itertext()) for c in tr] for tr in table.iter("tr")]
        for table in root.iter("table")
    }
    return root, tables


def saved(name, seed, test, root, **options):
    run = save_run(made_run(name, seed, test, root=root, **options))
    RunFolder(run.path).log("a line")
    return run


@pytest.fixture
def page(tmp_path):
    """Writes a page with all elements; returns its folder, input tables, root and parsed tables."""
    folder = tmp_path / "results"
    three = (40.125, 40.25, 40.375)
    wide, narrow = (
        {"experiment": {"name": "x", "network": {"hidden": hidden}}, "epochs": 3, "dropout": False}
        for hidden in ([8, 8], [4])
    )
    from_log = {"seconds": None, "environment": {"retrieved": True}}
    runs = {
        "fc": [
            saved("fc", 0, three, root=folder, **wide),
            saved("fc", 1, three[:2], root=folder, loss=None, **wide),
            saved("fc", 2, three[:1], root=folder, environment={"torch": "3"}, **wide),
            RunResult(folder / "fc/seed-3"),
        ],
        "100% a#b": [
            save_run(made_run("100% a#b", 0, three, root=folder, **from_log, **narrow)),
            saved("100% a#b", 1, three, root=tmp_path, **narrow),
        ],
    }
    rows = [
        Row("fc", (41.0, 0.5), (51.0, None), {"act1": (0.25, 0.125)}, "fc/seed-0", 2, "1 diverged"),
        Row(HOSTILE, (40.0, None), (50.0, None), seeds=1),
    ]
    tables = [Table(f"One {HOSTILE}", rows, ["act1"]), Table("Two", rows[:1], [])]
    png = tmp_path / "figure.png"
    png.write_bytes(b"\x89PNG not really")
    figures = [Figure(png, f"alt {HOSTILE}", f"caption {HOSTILE}", 3.4)]
    write_report(folder, f"Title {HOSTILE}", tables, figures, runs)
    return folder, tables, *parse(folder)


def test_every_cell_of_the_tables_is_shown_and_escaped(page):
    folder, given, root, tables = page
    assert HOSTILE not in (folder / "report.html").read_text(encoding="utf-8")
    assert [root.findtext(".//title"), root.findtext(".//h1")] == 2 * [f"Title {HOSTILE}"]
    for table in given:
        assert tables[table.title] == table.cells()


def test_figures_are_embedded_and_the_page_loads_nothing(page):
    folder, _, root, _ = page
    image = root.find(".//img")
    kind, data = image.get("src").split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (folder.parent / "figure.png").read_bytes()
    assert image.get("alt") == f"alt {HOSTILE}"
    assert root.findtext(".//figcaption") == f"caption {HOSTILE}"
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    for loading in ("http", "<script", "<link", "<iframe", "<object", "url(", "@import"):
        assert loading not in text


def test_every_run_is_listed_with_its_state_and_its_last_numbers(page):
    assert page[3][RUNS] == [
        ["run", "state", "test accuracy (%)", "train accuracy (%)", "test loss", "train loss",
         "seconds", "log"],
        ["fc/seed-0", "finished", "40.38", "50.38", "1.5000", "1.2500", "4.5", "log"],
        ["fc/seed-1", "diverged in epoch 2", "40.25", "50.25", "1.5000", "", "3.0", "log"],
        ["fc/seed-2", "epoch 1 of 3", "40.12", "50.12", "1.5000", "1.2500", "1.5", "log"],
        ["fc/seed-3", "not run", "", "", "", "", "", ""],
        ["100% a#b/seed-0", "finished, from a log", "40.38", "50.38", "1.5000", "1.2500", "", ""],
        ["100% a#b/seed-1", "finished", "40.38", "50.38", "1.5000", "1.2500", "4.5", ""],
    ]  # fmt: skip


def test_links_lead_only_below_the_folder_of_the_page(page):
    folder, _, root, _ = page
    links = [(link.text, link.get("href")) for link in root.iter("a")]
    logs = [address for text, address in links if text == "log"]
    assert logs == [f"fc/seed-{seed}/log.txt" for seed in range(3)]
    runs = {text: address for text, address in links if text != "log"}
    assert list(runs) == ["fc/seed-0", "fc/seed-1", "fc/seed-2", "100% a#b/seed-0"]
    for text, address in runs.items():
        assert (folder / unquote(address)).samefile(folder / text) and "#" not in address


def test_common_settings_and_versions_are_listed_once(page):
    tables = page[3]
    assert dict(tables["Common to all experiments"]) == {
        "setting": "value", "dropout": "no", "dataset": "tiny", "epochs": "3",
        "batch size": "8", "protocol": "release",
    }  # fmt: skip
    assert tables["Different between experiments"] == [
        ["experiment", "hidden"], ["fc", "8, 8"], ["100% a#b", "4"]
    ]  # fmt: skip
    assert tables["Versions and devices"][1:] == [
        ["torch", "2 (3 of 5 runs), 3 (1 of 5 runs)"],
        ["retrieved", "yes (1 of 5 runs)"],
    ]
