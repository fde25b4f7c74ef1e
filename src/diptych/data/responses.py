"""What was measured while stimuli were seen or heard: responses event by event, recordings over time, dissimilarities of stimuli."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from diptych.errors import DataError


@dataclass(frozen=True)
class Responses:
    """Responses to events, in the order in which the events happened.

    Attributes:
        values: Per event, site and bin of time; one bin where there was no time course.
        sites: Names: electrodes, voxels, raters, units.
    """

    values: Float[np.ndarray, "n s k"]
    sites: tuple[str, ...]

    @property
    def targets(self) -> Float[np.ndarray, "n t"]:
        """Return one column per site and bin, bins of a site side by side."""
        return self.values.reshape(len(self.values), -1)


def read_responses(path: Path) -> Responses:
    """Return responses from a file.

    - .npy: events x sites, or events x sites x bins.
    - .npz: the same as `responses`, and perhaps names as `sites`.
    - .csv: one row per event, one column per site, the names in the first row.

    Raises:
        DataError: If the file is not one of these, or a number is not finite; names event and site.
    """
    if path.suffix == ".csv":
        names, values = _read_csv(path)
    else:
        arrays = _arrays(path)
        found = arrays.get("responses")
        if found is None:
            raise DataError(
                f"{path} holds no array `responses`, only {', '.join(arrays) or 'nothing'}. Save it under that name."
            )
        values, names = found, tuple(map(str, arrays.get("sites", np.arange(found.shape[1] if found.ndim > 1 else 1))))
    return responses_of(values, names, str(path))


def responses_of(values: np.ndarray, sites: Sequence[str], name: str = "The array") -> Responses:
    """Return an array of events x sites, or events x sites x bins, as responses.

    Raises:
        DataError: If it has another shape, does not fit the names, or a number is not finite.
    """
    if values.ndim not in (2, 3) or values.shape[1] != len(sites):
        raise DataError(
            f"{name} must be events x {len(sites)} sites, or events x sites x bins; its shape is {values.shape}."
        )
    values = values.reshape(*values.shape[:2], -1).astype(np.float64)
    if not np.isfinite(values).all():
        event, site, _ = np.argwhere(~np.isfinite(values))[0].tolist()
        raise DataError(
            f"{name} has a number that is not finite: event {event}, site {sites[site]}. Leave the event out, or fill it in."
        )
    return Responses(values, tuple(sites))


def cut_windows(
    recording: Float[np.ndarray, "time channels"],
    rate: float,
    onsets: Float[np.ndarray, " n"],
    *,
    window: float = 0.2,
    stride: float = 0.025,
    span: tuple[float, float] = (-2.0, 2.0),
    sites: Sequence[str] = (),
) -> Responses:
    """Return the mean of a recording in windows around each event: with the defaults 161 bins, whose centres run from -2 to 2 s.

    Args:
        recording: One column per channel.
        rate: Samples per second.
        onsets: When each event began, in seconds from the start of the recording.
        window: Length of a window, seconds.
        stride: Between windows, seconds.
        span: First and last centre of a window, seconds from the onset.
        sites: Names of the channels; their numbers when absent.

    Raises:
        DataError: If a window begins before the recording or ends behind it; names the event.

    Source: Subramaniam et al. 2024 (arXiv 2406.14481), section 3.
    """
    bins = round((span[1] - span[0]) / stride) + 1
    centres = span[0] + stride * np.arange(bins)
    width = max(1, round(window * rate))
    first = np.rint((onsets[:, None] + centres - window / 2) * rate).astype(np.int64)
    outside = np.nonzero((first < 0).any(1) | (first + width > len(recording)).any(1))[0]
    if len(outside):
        raise DataError(
            f"{len(outside)} events have windows outside of the recording of {len(recording) / rate:g} s, the first at "
            f"{onsets[outside[0]]:g} s. Leave them out, or make the span shorter."
        )
    sums = np.concatenate([np.zeros((1, recording.shape[1])), recording.cumsum(0, dtype=np.float64)])
    means = (sums[first + width] - sums[first]) / width
    return responses_of(means.transpose(0, 2, 1), tuple(sites) or tuple(map(str, range(recording.shape[1]))))


def read_dissimilarities(path: Path) -> Mapping[str, Float[np.ndarray, "n n"]]:
    """Return matrices of how unlike stimuli are, by name: all square arrays of a .npz file, or the one of a .npy or .csv file.

    Raises:
        DataError: If there is none, or one is not symmetric or not finite.
    """
    if path.suffix == ".csv":
        arrays: Mapping[str, np.ndarray] = {path.stem: np.genfromtxt(path, delimiter=",")}
    else:
        arrays = {
            path.stem if name == "responses" and path.suffix == ".npy" else name: a for name, a in _arrays(path).items()
        }
    found = {}
    for name, matrix in arrays.items():
        if matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 1:
            if not np.isfinite(matrix).all() or not np.allclose(matrix, matrix.T, atol=1e-5 * np.abs(matrix).max()):
                raise DataError(f"{name} in {path} must be a finite symmetric matrix of dissimilarities, and is not.")
            found[name] = matrix.astype(np.float64)
    if not found:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise DataError(f"{path} holds no square matrix, only {shapes or 'nothing'}.")
    return found


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as .npy or .npz: {error}") from error
    if isinstance(loaded, np.ndarray):
        return {"responses": loaded}
    with loaded:
        return {name: loaded[name] for name in loaded.files}


def _read_csv(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    try:
        return tuple(header), np.array([[float(cell) for cell in row] for row in rows])
    except ValueError as error:
        raise DataError(f"{path} must hold one row of numbers per event under a row of names: {error}") from error
