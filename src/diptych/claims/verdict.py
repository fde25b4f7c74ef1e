"""When a claim counts as reproduced. The rule stands here, before any run, and nothing else decides."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from diptych.errors import EvaluationError
from diptych.types import Interval

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]


def decide(difference: Interval, *, control_passed: bool, higher_is_better: bool = True) -> Verdict:
    """Return the verdict.

    The gain is `difference`, its sign turned where lower is better. What is 0 is not excluded by an interval that ends there.

    - reproduced: the interval of the gain lies above 0, and the control came out as it must.
    - not reproduced: the interval of the gain lies below 0; or it lies above 0 and the control did not come out as it must, so that the
      gain is not due to the idea.
    - inconclusive: the interval holds 0. The seeds do not tell, whatever the control does.

    Args:
        difference: Metric of the method minus metric of the baseline, with its 95 % interval over seeds.
        control_passed: Whether the control came out as the claim says it must.
        higher_is_better: Direction of the metric.
    """
    low, high = (difference.low, difference.high) if higher_is_better else (-difference.high, -difference.low)
    if low > 0:
        return "reproduced" if control_passed else "not reproduced"
    return "not reproduced" if high < 0 else "inconclusive"


def paired_over_seeds(baseline: Sequence[float], method: Sequence[float]) -> Interval:
    """Return mean(method - baseline) over seeds with its 95 % interval.

    Seeds are paired: both arms of a seed share initial weights, order and data, so what those do to both cancels.

    Raises:
        EvaluationError: If the two have different numbers of seeds, or fewer than two.
    """
    if len(baseline) != len(method):
        raise EvaluationError(
            f"Paired seeds need one number each; the baseline has {len(baseline)}, the method {len(method)}."
        )
    return over_seeds([after - before for before, after in zip(baseline, method, strict=True)])


def over_seeds(values: Sequence[float]) -> Interval:
    """Return the mean over seeds with its 95 % interval by Student's t: mean +- t(n - 1) s / sqrt(n).

    Three seeds are too few to resample: a bootstrap of three has ten different means, and its interval is far too narrow. Student's t is
    wide for few seeds (t = 4.30 for three) and exact if seeds scatter normally. Equal values give an interval of width 0.

    Raises:
        EvaluationError: If there are fewer than two values.

    Source: Student 1908; Bouthillier et al. 2021 (arXiv 2103.03098) on why seeds must be repeated and paired.
    """
    if len(values) < 2:
        raise EvaluationError(f"An interval over seeds needs at least two of them; there are {len(values)}.")
    numbers = np.asarray(values, dtype=np.float64)
    mean = float(numbers.mean())
    half = student_t(len(numbers) - 1) * float(numbers.std(ddof=1)) / len(numbers) ** 0.5
    return Interval(mean, mean - half, mean + half)


def student_t(freedom: int, level: float = 0.95) -> float:
    """Return the value that |t| stays below with probability `level`; 1.96 in the limit of many degrees of freedom.

    With t = sqrt(freedom) tan(a) the density of the angle a is proportional to cos(a)^(freedom - 1), which is summed by trapezoids.
    """
    angle = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(freedom**0.5 * np.tan(np.interp(level, mass / mass[-1], angle)))
