"""`diptych evaluate --tasks robustness`: numbers on the terminal and in the record, and the card."""

import json

import pytest

from diptych.cli import main
from diptych.models.checkpoint import save_model
from tiny_run import write_photos

FAST = ("--robustness.steps", "1", "--robustness.eps", "8", "--robustness.corruptions", "jpeg")


@pytest.fixture
def evaluated(make_model, drawings, tmp_path, capsys):
    """Return a function that evaluates a tiny model on eight drawings and returns exit code and what was said."""
    save_model(make_model(), tmp_path / "model")
    photos = write_photos(tmp_path / "photos", drawings(8))

    def run(*arguments: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", str(photos), "--model", str(tmp_path / "model"), *arguments])
        said = capsys.readouterr()
        return stopped.value.code, said.out + said.err

    return run


@pytest.mark.parametrize("ending", [".html", ".md"])
def test_numbers_are_said_recorded_and_put_on_a_card(evaluated, tmp_path, ending):
    card, record = tmp_path / f"card{ending}", tmp_path / "found.json"
    code, said = evaluated("--tasks", "robustness", *FAST, "--card", str(card), "--json", str(record))
    assert code == 0 and "PGD, eps 8" in said and "wrong words" in said and "all corruptions" in said
    found = json.loads(record.read_text())
    names = [row["name"] for row in found["robustness"]["rows"]]
    assert names[:5] == ["clean", "noise, eps 8", "PGD, eps 8", "empty box", "wrong words"]
    clean = found["robustness"]["rows"][0]["scores"]["image_to_text/recall@1"]["value"]["value"]
    assert found["retrieval"]["image_to_text"]["recall@1"]["value"] == clean
    assert f"{clean:.3f}" in card.read_text() and "photos" in card.read_text()


@pytest.mark.parametrize("ending", [".html", ".md"])
def test_a_second_model_is_audited_too(evaluated, make_model, tmp_path, ending):
    save_model(make_model(1), tmp_path / "other")
    card, record, against = tmp_path / f"card{ending}", tmp_path / "found.json", str(tmp_path / "other")
    code, said = evaluated(
        "--tasks", "robustness", *FAST, "--against", against, "--card", str(card), "--json", str(record)
    )
    assert code == 0 and f"minus {against}, image_to_text/recall@1, each attacked for itself" in said
    found = json.loads(record.read_text())
    differences = found["robustness"]["difference"]
    assert list(differences) == ["image_to_text/recall@1", "text_to_image/recall@1"]
    names = [row["name"] for row in found["robustness"]["rows"] if row["severity"] is None]
    for metric, values in differences.items():
        assert list(values) == names
        assert values["clean"] == found["difference"][metric]
        assert f"  {'PGD, eps 8':32} {values['PGD, eps 8']['value']:+.3f}" in said
    assert card.read_text().count(f"{against} on the same images") == 2


def test_without_the_task_images_are_as_they_are(evaluated):
    code, said = evaluated("--tasks", "retrieval")
    assert code == 0 and "PGD" not in said


@pytest.mark.parametrize("arguments", [("--card", "card.html"), ("--tasks", "robustness", "--card", "card.pdf")])
def test_a_card_needs_the_task_and_a_known_ending(evaluated, arguments):
    code, said = evaluated(*arguments)
    assert code == 2 and ".html or .md" in said
