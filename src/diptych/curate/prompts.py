"""Few-shot prompts that show a language model how captions are put differently, and how its answer is read.

The official prompts are repeated exactly with `official=True`, with their quirks: lines are indented by twelve spaces, and the answer is
looked for on line 8 of everything, so that a caption with `=>` in it returns its own tail. The clean form, which is the default, has no
indent, makes one line of the caption and takes the first line of what the model adds.

Source: Fan et al. 2023, "Improving CLIP Training with Language Rewrites", section 3.1; official code, `rewrite/llama_rewrite.py`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diptych.errors import ConfigError, TextError, nearest

_TASK = "write image captions differently,"
_ARROW = "=>"
_ANSWER_LINE = 8


@dataclass(frozen=True)
class FewShot:
    """Examples of one style.

    Attributes:
        examples: Either (caption, rewrite) pairs, or, with `drawn`, captions of one image each.
        drawn: Draw two captions of an example and let one be the rewrite of the other, as with the captions of MS COCO.
        shots: Examples per prompt; the official prompts have 3.
        official: Repeat the official prompts and their reading with all quirks.
    """

    examples: Sequence[Sequence[str]]
    drawn: bool = False
    shots: int = 3
    official: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.shots <= len(self.examples):
            raise ConfigError(
                f"There are {len(self.examples)} examples; shots must be 1 to that many, not {self.shots}."
            )
        if short := [list(example) for example in self.examples if len(example) < 2]:
            raise ConfigError(f"An example needs two texts; this one has fewer: {short[0]}.")

    def build(self, caption: str, rng: random.Random) -> str:
        """Return the prompt for one caption; it ends where the model goes on."""
        places = rng.sample(range(len(self.examples)), self.shots)
        pairs = [self._pair(self.examples[place], rng) for place in places]
        caption = caption.replace("\n", "") if self.official else one_line(caption)
        lines = [f"{source} {_ARROW} {target}" for source, target in pairs]
        indent = " " * 12 if self.official else ""
        return f"\n\n{indent}".join([_TASK, *lines, f"{caption} {_ARROW}"])

    def parse(self, prompt: str, completion: str) -> str:
        """Return the rewrite in what a model added to a prompt, empty when there is none.

        Raises:
            TextError: With `official`, if there is no line 8 or no arrow on it, where the official code fails.
        """
        if self.official:
            try:
                line = (prompt + completion).split("\n")[_ANSWER_LINE]
                return line.split(_ARROW)[1].strip()
            except IndexError as error:
                raise TextError(
                    f"The official reading takes line {_ANSWER_LINE + 1} of prompt and answer, behind the arrow; there is none in "
                    f"{completion!r}. A caption was cut or has a line break in it; use official=False."
                ) from error
        parts = [part.strip() for part in next(iter(completion.strip().splitlines()), "").split(_ARROW)]
        asked = prompt.rpartition("\n")[2].removesuffix(_ARROW).strip()
        answer = parts[1] if len(parts) > 1 and parts[0] == asked else parts[0]  # some models repeat the question first
        return " ".join(answer.strip("\"'“” ").split())

    def _pair(self, example: Sequence[str], rng: random.Random) -> tuple[str, str]:
        first, second = rng.sample(range(len(example)), 2) if self.drawn else (0, 1)
        return example[first], example[second]


def cut_prompt(
    prompt: str, limit: int, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> str:
    """Return a prompt that a model with room for `limit` tokens can take: one of more than limit - 5 is cut at limit - 10.

    The cut falls into the caption, which is last, and an arrow is put behind it. Same rule as in the official code.

    Args:
        prompt: From `FewShot.build`.
        limit: Tokens that the model can take; 512 in the official code.
        encode: Text to ids, with the id that begins a text.
        decode: Ids to text.
    """
    ids = encode(prompt)
    return prompt if len(ids) <= limit - 5 else f"{decode(ids[: limit - 10])} {_ARROW}"


def one_line(caption: str) -> str:
    """Return a caption that cannot be taken for a part of the prompt: one line, no arrow."""
    return " ".join(caption.replace(_ARROW, "->").split())


def style(name: str, *, shots: int = 3, official: bool = False) -> FewShot:
    """Return the examples of a style of ours.

    Raises:
        ConfigError: If there is no such style; names the nearest.
    """
    if name not in STYLES:
        raise ConfigError(f"There is no style {name!r}. {nearest(name, STYLES)}")
    return FewShot(STYLES[name], shots=shots, official=official)


STYLES = {
    "reworded": (
        ("A man walks his dog along the beach .", "A dog and a man stroll along the beach."),
        ("Two kids are playing with a ball in the park", "In the park, two kids throw a ball around."),
        ("a woman in a red coat waits for the bus", "Wearing a red coat, a woman stands at the bus stop."),
        ("Three birds sitting on a wire .", "A wire with three birds perched on it."),
        ("The boy jumps into the swimming pool .", "A boy leaps into the water of a pool."),
        ("a bowl of soup and a slice of bread", "A slice of bread lies beside a bowl filled with soup."),
        ("A black horse runs across the field .", "Across the field gallops a black horse."),
        ("People ride bicycles down a busy street", "A busy street is full of people on bicycles."),
    ),
    "short": (
        ("A man in a blue shirt is standing on a ladder cleaning a window .", "A man on a ladder cleans a window."),
        ("Two brown dogs are running through the tall green grass .", "Two dogs run through tall grass."),
        ("A little girl with a yellow hat is eating an ice cream cone", "A girl in a hat eats ice cream."),
        ("a very large white boat sits in the harbor near other boats", "A white boat among others in a harbor."),
        ("Some people wearing warm jackets are hiking up a snowy mountain .", "People hike up a snowy mountain."),
        ("The guitar player is performing on a stage with bright lights .", "A guitar player on a bright stage."),
    ),
    "sentence": (
        ("red apple wooden table", "A red apple lies on a wooden table."),
        ("kids, sand castle, beach", "Kids build a sand castle on a beach."),
        ("old clock tower at night", "An old clock tower can be seen at night."),
        ("vintage blue car parked street", "A vintage blue car is parked on a street."),
        ("cat asleep on sofa", "A cat is asleep on a sofa."),
        ("mountain lake, morning fog", "Morning fog hangs over a mountain lake."),
    ),
}
"""Our own examples: other words and order, fewer words, and whole sentences from keywords. Each keeps what its caption names."""
