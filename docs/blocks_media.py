"""Blocks of docs/see.md and docs/listen.md: models with encoders beside their twins."""

from statistics import mean
from typing import Any

from blocks import EPYC, SPEAKERS, ZEN4, average, by_seed, heard, result, table

HEAD = "{} | RetNet, seed 0 | RetNet, seed 1 | twin, seed 0 | twin, seed 1 | 95 % interval"
"""Head of a table by seed. The interval is half the widest of the four."""


def percent(value: float, digits: int) -> str:
    return f"{100 * value:.{digits}f}"


def width(rows: list[dict[str, Any]]) -> float:
    """Half of the widest interval."""
    return max(r["interval"][1] - r["interval"][0] for r in rows) / 2


def seen(what: str, head: str, asked: dict[tuple[str, str], str], digits: int) -> str:
    """Table of tasks and metrics in percent, by seed. `asked` has the words of each row."""
    rows = result(what, EPYC)["rows"]

    def line(task: str, metric: str, words: str) -> str:
        found = [r for model in ("retnet", "twin") for r in by_seed(rows, model, task, metric)]
        cells = [percent(r["value"], digits) for r in found]
        return " | ".join([f"{words}; {found[0]['n']:,}", *cells, f"± {percent(width(found), digits)}"])

    return table(HEAD.format(head), *(line(*key, words) for key, words in asked.items()))


def seen_digits() -> str:
    """Right answers about handwritten digits."""
    asked = {
        ("answers:test", "exact"): "a picture, then the question",
        ("answers:before", "exact"): "the question, then the picture",
        ("answers:around", "exact"): "the question before and after it",
        ("answers:shuffled", "exact"): "another question's picture (chance: 10)",
    }
    for of in (8, 16):
        for k, name in ((1, "first"), (of // 2, f"{of // 2}th"), (of, "last")):
            asked[f"answers:row{of}-{k}", "exact"] = f"the {name} of {of} pictures"
    return seen("seen-digits-1m", "right answers, %; questions", asked, 1)


def seen_rate() -> str:
    """Right answers of the twin at half the learning rate, beside both at the rate of the recipe."""
    recipe, half = result("seen-digits-1m", EPYC)["rows"], result("seen-digits-half-rate-1m", ZEN4)["rows"]
    columns = ((recipe, "retnet"), (recipe, "twin"), (half, "twin"))

    def learnt(rows: list[dict[str, Any]], model: str) -> str:
        places = (r for k in range(1, 17) for r in by_seed(rows, model, f"answers:row16-{k}", "exact"))
        return f"{sum(r['value'] > 0.85 for r in places) / 2:g}"

    def line(words: str, task: str) -> str:
        return " | ".join([words, *(average(by_seed(*column, f"answers:{task}", "exact")) for column in columns)])

    return table(
        "mean of two seeds | RetNet, 4e-3 | twin, 4e-3 | twin, 2e-3",
        line("a single picture", "test"),
        line("the first of 8 pictures", "row8-1"),
        line("the last of 8 pictures", "row8-8"),
        " | ".join(["places of 16 learnt (above 85 %)", *(learnt(*column) for column in columns)]),
    )


def seen_emoji() -> str:
    """Names found for held-out pictures of emoji, and pictures for names."""
    asked = {
        ("naming:kin", "first"): "name ranked first",
        ("naming:kin", "first10"): "name among the first ten",
        ("answers:kin", "exact"): "name written",
        ("naming:kin", "found"): "picture ranked first for its name",
        ("naming:new", "first10"): "no other picture: name among the first ten",
        ("naming:new", "found10"): "no other picture: picture among the first ten",
    }
    return seen("seen-emoji-1m", "held-out pictures, %; questions", asked, 0)


def heard_digits() -> str:
    """Word error rate by held-out speaker, and of the other tasks as means over all speakers."""

    def line(words: str, *speakers: str, task: str | None = None) -> str:
        found = [rows for model in ("retnet", "twin") for rows in heard(model, speakers or list(SPEAKERS), task)]
        cells = [percent(mean(r["value"] for r in rows), 1) for rows in found]
        # an average over trainings has no interval of its own: that of one speaker says nothing of the others
        interval = f"± {percent(width([r for rows in found for r in rows]), 1)}" if len(speakers) == 1 else ""
        return " | ".join([words, *cells, interval])

    return table(
        HEAD.format("words wrong, %"),
        *(line(f"{speaker}, held out", speaker) for speaker in SPEAKERS),
        line(f"mean of these {len(SPEAKERS)}"),
        line("new recordings of speakers in the training set", task="known"),
        line("the last of five turns", task="turns5"),
        line("the last of fifty turns", task="turns50"),
        line("five digits in one clip", task="row5"),
        line("fifty digits in one clip", task="row50"),
    )


def heard_rate() -> str:
    """Word error rate at half the learning rate, with lucas held out."""
    recipe, half = result("heard-lucas-1m", ZEN4)["rows"], result("heard-lucas-half-rate-1m", ZEN4)["rows"]
    columns = [(rows, model) for model in ("retnet", "twin") for rows in (recipe, half)]

    def line(words: str, task: str) -> str:
        return " | ".join([words, *(average(by_seed(*column, f"transcription:{task}", "wer")) for column in columns)])

    return table(
        "words wrong, mean of two seeds | RetNet, 4e-3 | RetNet, 2e-3 | twin, 4e-3 | twin, 2e-3",
        line("lucas, held out", "lucas"),
        line("the last of fifty turns", "turns50"),
    )
