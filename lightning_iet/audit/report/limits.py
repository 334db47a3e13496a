"""What the figures of an audit do not show."""

from lightning_iet.audit.features import PIXELS
from lightning_iet.audit.findings import Findings

__all__ = ["limits"]


def limits(findings: Findings) -> list[str]:
    """List what a reader must not conclude.

    Args:
        findings: the figures; what they leave open depends on the settings.

    Returns:
        Sentences.
    """
    settings = findings.settings
    found = [
        "These are the images that were drawn, not all that the generator can draw. The interval speaks of further "
        "images drawn in the same way; other prompts, guidance or samplers may bring out other copies.",
        "A training image that no generated image resembles may still be memorized.",
    ]
    if settings["features"] == PIXELS:
        unseen = {
            "none": "mirrored, moved by a few pixels,",
            "flip": "moved by a few pixels,",
            "shift": "mirrored, moved by more than one pixel,",
            "flip+shift": "moved by more than one pixel,",
        }[settings["invariance"]]
        found.append(
            f"Distances between pixels miss copies that are {unseen} cropped, rotated, recoloured, or copied in part. "
            "Features of a network made for copy detection find more of them."
        )
    else:
        found.append(
            "Distances between features find what the network was trained to see. Small details, such as a face or a "
            "text in the background, may be copied unnoticed."
        )
    if findings.held_out is None:
        found.append(
            "There are no held-out images to compare with, so that nobody can tell a copy from a data set of low "
            "variety, where everything is near to everything."
        )
    else:
        found.append(
            "Held-out images serve as a control only if they come from the same source as the training images and "
            "have no duplicates among them."
        )
        if findings.held_out.identical:
            found.append(
                f"{findings.held_out.identical:,} of the held-out images equal a training image in every pixel. They "
                "are no control: the share of copies among held-out images is too high by them."
            )
    if findings.membership is not None:
        found.append(
            "Membership is inferred from the loss alone, a weak attack: where it fails, a strong one may succeed. It "
            "proves nothing if held-out images come from another source than the training images."
        )
    if findings.duplicates is None:
        found.append("Near-duplicates inside the training set were not looked for; they hide copies from d1/d2.")
    if any(facts.skipped for facts in findings.sets.values()):
        found.append("Images that could not be read were not compared. They are listed above.")
    found.append(
        "Likeness is no proof of how it came about, nor a legal judgement: look at the pairs before speaking of copies."
    )
    return found
