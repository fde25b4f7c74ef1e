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


def test_without_the_task_images_are_as_they_are(evaluated):
    code, said = evaluated("--tasks", "retrieval")
    assert code == 0 and "PGD" not in said


@pytest.mark.parametrize("arguments", [("--card", "card.html"), ("--tasks", "robustness", "--card", "card.pdf")])
def test_a_card_needs_the_task_and_a_known_ending(evaluated, arguments):
    code, said = evaluated(*arguments)
    assert code == 2 and ".html or .md" in said
