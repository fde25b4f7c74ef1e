import pytest

from diptych.config import override
from diptych.errors import ConfigError
from diptych.methods import clip


@pytest.mark.parametrize(
    "changes", [{"epochs": 0}, {"accumulate": 0}, {"save_every": 0}, {"log_every": -1}, {"evaluate_every": -1}]
)
def test_counts_out_of_range_are_refused(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ConfigError, match=f"A run takes epochs.* not .*{name} {value}"):
        override(clip.recipe(), changes)


def test_only_evaluation_may_be_left_to_the_end():
    assert override(clip.recipe(), {"evaluate_every": 0, "save_every": 10**9}).evaluate_every == 0
