"""Made-up lines of the benchmark's results."""

FIGURES = ("memorized_fraction", "copied_images", "mq_0.15", "mq_0.3", "membership_auc")


def point(row, seed, length, fid, memorized, *, seconds=None, unseen=1.0, selection=None):
    """A line of points.csv with made-up figures."""
    figures = dict.fromkeys(FIGURES, memorized)
    return {
        "setting": "digits", "row": row, "seed": seed, "length": length, "mark": int(100 * length),
        "steps": int(100 * length), "fid": fid, "seconds": length if seconds is None else seconds, "skip_rate": 0.25,
        "unseen_loss": unseen, "fid_selection": fid if selection is None else selection, "fid_train": 3.0,
        **figures, **{f"{name}_control": 0.1 for name in ("fid", *FIGURES)},
    }  # fmt: skip
