"""The answer of an audit in words, and its figures in the terminal."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rich.table import Table

from lightning_iet.audit.comparability import FAR, LEVELS_OF_SET, NOISE, OF_FILES, SHAPE, TRANSPARENCY, Difference
from lightning_iet.audit.findings import Findings, PlantedFindings, SetFacts, SetFindings, claimed
from lightning_iet.audit.statistics import Nearer, Share, excess, share
from lightning_iet.data.decoding import WINDOWED
from lightning_iet.data.listing import left_alone
from lightning_iet.data.samples import listed
from lightning_iet.evaluation.membership import Membership
from lightning_iet.evaluation.verdict import SIGNIFICANT, loss_tells
from lightning_iet.utilities.text import percent

Level = Literal["copies", "control", "none", "open"]

SEARCHED = {
    "plain": "",
    "recoloured": ", colours apart",
    "degraded": ", details apart",
    "moved": ", moved into its place",
}
UNREAD = 0.1  # part of a set, in images or in files, that cannot be read, from which on nothing is decided (our choice)
PROMISED = ("mirrored", "recoloured")
"""Kinds of copies beside exact ones that are found of nearly all sets; where they are not, nothing is decided."""
UNSEEN = "copies of a part of an image, and copies that were drawn anew"


class Verdict(NamedTuple):
    """An audit in words.

    Attributes:
        level: ``"copies"``, where images are named as copies, or the scan is significant; ``"open"``, where something
            was seen that these images cannot decide, or the sets cannot be compared, or the audit does not find what it
            planted; ``"control"``, where neither holds and images pass for copies by the published measure: as large a
            share of the held-out images passes, or a smaller one by what may be chance, or there are none, or those
            that pass show one colour or were dismissed; or ``"none"``, where no image passes.
        answer: the answer, one sentence.
        looked_for: what was looked for, and how well it was found.
        also: what the losses and other measures say, where it is significant.
        details: how sure it is.
    """

    level: Level
    answer: str
    looked_for: str
    also: str
    details: str

    @property
    def headline(self) -> str:
        """The answer, what was looked for, and what else there is to know."""
        return " ".join(part for part in (self.answer, self.looked_for, self.also) if part)


def verdict(findings: Findings) -> Verdict:
    """Say in plain words whether the generated images are copies.

    *Copies*: some images are named as copies, or the scan of all thresholds finds more images near to single training
    images than chance gives in one of a hundred audits *(our choice)*; unless none is a sure copy and there is reason
    to doubt the comparison with held-out images, see :func:`_doubts`. Else *open* if something was noticed that is not
    decided, if more images than held-out ones pass for copies by the published measure and by more than chance, if the
    sets cannot be compared, or if the audit did not find what it planted itself. Else *control* if any image passes for
    a copy by the published measure; else *none*. With held-out images are compared those that the tests judge, see
    :func:`~lightning_iet.audit.evidence.to_judge`, and that nobody has dismissed.
    """
    evidence = findings.evidence
    named, total = counted(findings), evidence.named.total
    also = " ".join([*map(_sentence, _nearer(findings.nearer)), *_loss(findings.membership)])
    scan, doubts = evidence.scan, _doubts(findings)

    def say(level: Level, answer: str, details: str) -> Verdict:
        return Verdict(level, answer, planted_words(findings.planted), also, f"{details}{_contaminated(findings)}")

    if named.count:
        are = "is a copy" if named.count == 1 else "are copies"
        answer = f"The generator copies: {_counted(named)} {are} of training images."
        beware = [f"Beware: {doubt}" for doubt in said_once(doubts)] if evidence.discovered else []
        above = not_counted(findings) or named_above(findings)
        details = " ".join([_kinds(findings), *above, *beware, *reviewed(findings)])
        return say("copies", answer, f"{details}{beyond_words(findings)}{_control(findings)}")
    is_significant = scan is not None and scan.p_value < SIGNIFICANT
    if scan is not None and is_significant and (evidence.sure > 0 or not doubts):
        answer = (
            f"The generator copies: {scan.generated:,} of {_judged(findings)} lie nearer to one training image "
            f"than {scan.threshold:.2f} times the next{SEARCHED[evidence.scan_search]}, but only {scan.held_out:,} of "
            f"{_control_images(findings, 'ones')} do."
        )
        times = 1 / scan.p_value if scan.p_value > 0 else float("inf")
        chance = "fewer than 1 of 1,000,000" if times >= 1e6 else f"1 of {round(times):,}"
        details = (
            f"If both sets were alike, chance would give so large an excess in {chance} audits. "
            "Which images are copies cannot be told one by one: they are those first in the list of pairs."
        )
        return say("copies", answer, " ".join([details, *reviewed(findings)]) + beyond_words(findings))
    seen = doubts if evidence.named.count or is_significant else []  # by a comparison that is doubted
    open_for = said_once([*seen, *_reasons(findings)])
    if open_for:
        rest = " ".join(map(_sentence, open_for[1:]))
        details = f"{rest} {_bound_or_control(findings, bound=False)}".strip()
        if any(said in text for said in _nearer(findings.nearer) for text in open_for):
            also = " ".join(_loss(findings.membership))
        return say("open", f"Not decided: {open_for[0]}", details)
    unread = len(findings.sets["generated"].skipped)
    more = f" {unread:,} more generated image{'' if unread == 1 else 's'} could not be read." if unread else ""
    if evidence.passing:
        passing, control = _passing(findings)
        answer = f"No sure sign of copying: {_passing_words(findings, passing)}."
        if control is not None:
            they, does = _control_words(findings, control)
            is_less = control.share < passing.share
            rest = f"but only {they} {does}, which may be chance" if is_less else f"and so {does} {they}"
            answer = f"{answer[:-1]}, {rest}."
        answer += more
        return say("control", answer, _bound_or_control(findings))
    if (uncounted := findings.generated.copies).count:
        verb, each = ("passes for a copy", "which") if uncounted.count == 1 else ("pass for copies", "each of which")
        answer = (
            f"No sure sign of copying: {_counted(uncounted)} {verb} by the published measure, {each} shows one colour "
            f"or was dismissed.{more}"
        )
        return say("control", answer, _bound_or_control(findings))
    rest = f"; {unread:,} more could not be read" if unread else ""
    return say("none", f"No copies found among {total:,} generated images{rest}.", _bound_or_control(findings))


def counted(findings: Findings) -> Share:
    """Count the images that the answer calls copies.

    Where there is reason to doubt the comparison with held-out images, those that are named by it alone do not count.

    Returns:
        Those that are named, or of these the sure ones.
    """
    evidence = findings.evidence
    if evidence.named.count > evidence.sure and _doubts(findings):
        return share(evidence.sure, evidence.named.total)
    return evidence.named


def not_counted(findings: Findings) -> list[str]:
    """Say how many more images only a comparison would name that is doubted.

    Returns:
        A sentence, or none where all that are named count.
    """
    rest = findings.evidence.named.count - counted(findings).count
    if not rest:
        return []
    are, they = ("is", "it") if rest == 1 else ("are", "they")
    return [
        f"{rest:,} more {are} not counted: {they} would be named only by comparison with held-out images, which is "
        "doubted here."
    ]


def planted_words(planted: Sequence[PlantedFindings]) -> str:
    """Say what was looked for, and how many of the copies that the audit planted itself were found.

    Example:
        >>> planted_words([PlantedFindings("exact", 20, 20, 0.8), PlantedFindings("moved", 17, 20, 0.6)])
        'Looked for exact (20 of 20 planted found) and moved copies (17 of 20).'
    """
    counts = [f"{part.found:,} of {part.planted:,}" for part in planted]
    words = []
    for position, part in enumerate(planted):
        noun = part.kind if position + 1 < len(planted) else f"{part.kind} copies"
        if counts[position + 1 : position + 2] == counts[position : position + 1]:  # said once, behind the last of them
            words.append(noun)
        else:
            words.append(f"{noun} ({counts[position]}{'' if '(' in ''.join(words) else ' planted found'})")
    return f"Looked for {_listed(words, 'and')}." if words else ""


def membership_words(membership: Membership) -> str:
    """Say in plain words whether the generator's loss tells training images from others."""
    answer = "gives no sure sign of which images were trained on"
    if _tells(membership):
        answer = "tells training images from held-out ones"
    rates = membership.true_positive_rates.items()
    found = ", ".join(f"{percent(share)} at {percent(float(rate))}" for rate, share in rates)
    loss = {None: "loss", True: "loss, given the images' labels,", False: "loss without labels"}[
        membership.labels_given
    ]
    return (
        f"The generator's {loss} {answer}: AUC {membership.auc:.3f} (95 % interval {membership.auc_low:.3f} to "
        f"{membership.auc_high:.3f}; 0.5 is chance). Training images found at few false positives: {found}."
    )


def said_once(reasons: Iterable[Sequence[str]]) -> list[str]:
    """Join the sentences of each reason, without those that an earlier one has said.

    Args:
        reasons: sentences, such as those of :func:`difference_sentences`.

    Returns:
        A text for each reason; none for one of which everything has been said.

    Example:
        >>> said_once([("they differ in contrast.", "Say so."), ("they differ in brightness.", "Say so.")])
        ['they differ in contrast. Say so.', 'they differ in brightness.']
    """
    said: set[str] = set()
    texts = []
    for reason in reasons:
        texts.append(" ".join(sentence for sentence in reason if sentence not in said))
        said.update(reason)
    return [text for text in texts if text]


def difference_sentences(difference: Difference) -> tuple[str, ...]:
    """Say in one sentence how the sets differ, then what to do about it."""
    return _how_different(difference), difference.remedy, *difference.more


def _how_different(difference: Difference) -> str:
    values = f"{difference.generated:.3g} against {difference.train:.3g}"
    if difference.name == TRANSPARENCY:
        values = f"{percent(difference.generated)} against {percent(difference.train)} of the images"
    if difference.name == SHAPE and difference.distance < 1:
        some = f"{percent(difference.distance)} of the generated images differ from training images"
        return f"{some} in {SHAPE} ({values})."
    if difference.name == NOISE:
        return (
            "the generated images look like noise: the model is trained too little, or was sampled in too few steps "
            f"(sharpness {values})."
        )
    if difference.name == FAR:
        return (
            "generated images lie much farther from training images than held-out images do (median distance "
            f"{values})."
        )
    if difference.compared == "held_out":
        return f"held-out and training images differ in {difference.name} ({values}): they are no control."
    return f"generated and training images differ in {difference.name} ({values})."


def _reasons(findings: Findings) -> list[Sequence[str]]:
    """List why nothing is decided, the weightiest first: what was found, then what to do."""
    evidence, generated, held_out = findings.evidence, findings.sets["generated"], findings.held_out
    passing, control = _passing(findings)
    # How files were stored comes first: it hides copies, those that were planted too, and no further images would help.
    # Only noise stands before it, in which there is nothing to find.
    first = NOISE, *OF_FILES
    reasons: list[Sequence[str]] = [difference_sentences(part) for part in findings.differences if part.name in first]
    stored_alike = not reasons

    def because(*sentences: str) -> None:
        reasons.append(sentences)

    if evidence.noticed.count and not evidence.held_out_judged:
        lie = "lies" if evidence.noticed.count == 1 else "lie"
        without, remedy = "without held-out images", "Add --held-out."
        if held_out is not None:
            without, remedy = "as no held-out image shows more than one colour,", "Give others with --held-out."
        because(
            f"{_counted(evidence.noticed)} {lie} as near to one training image as copies do, but {without} nobody "
            "can tell how many of them are chance: on data of low variety, images that nobody copied lie so near "
            "as well.",
            remedy,
        )
    elif evidence.noticed.count:
        needed = ""
        if evidence.held_out_needed and stored_alike:
            needed = f" About {evidence.held_out_needed:,} held-out images would decide."
        are = "is" if evidence.noticed.count == 1 else "are"
        because(
            f"{_counted(evidence.noticed)} {are} far nearer to one training image than real images are.{needed} "
            f"Look at the pairs.{beyond_words(findings)}",
        )
    elif findings.generated.identical and held_out is not None and held_out.identical:
        own, others = findings.generated.identical, held_out.identical
        because(
            f"{own:,} of {generated.used:,} generated images {'equals' if own == 1 else 'equal'} a training image "
            f"in every pixel, but so {'does' if others == 1 else 'do'} {others:,} of the held-out images: they "
            "are no control.",
            "Remove such images from --held-out.",
        )
    elif control is not None and excess(passing, control).p_value < SIGNIFICANT:
        but_only = " ".join(_control_words(findings, control))
        because(f"{_passing_words(findings, passing)}, but only {but_only}.", "Look at the pairs.")
    for name, kind in (("generated", "generated"), ("train", "training")):
        facts = findings.sets[name]
        unread = f"{len(facts.skipped):,} of {facts.found:,} {kind} images"
        if len(facts.skipped) <= UNREAD * facts.found:
            # A file of many pages that cannot be read counts as one image, however many it holds.
            unread = f"{percent(facts.origin.unread)} of the files of {kind} images"
        if max(len(facts.skipped) / max(facts.found, 1), facts.origin.unread) > UNREAD:
            unknown = "them" if name == "generated" else "copies of them"
            because(f"{unread} could not be read, and nothing is known of {unknown}.", _SAVE_ANEW)
        if (beside := sum(facts.beside.values())) > UNREAD * (facts.found + beside):
            lie, were = ("lies 1 file", "was") if beside == 1 else (f"lie {beside:,} files", "were")
            because(
                f"beside the {facts.found:,} {kind} images {lie} that may hold more, and {were} not read "
                f"({left_alone(Counter(facts.beside))}).",
                "Bring them to a form that is read, or move them elsewhere.",
            )
    reasons += _uniform(generated, "generated")
    if held_out is not None:
        reasons += _uniform(findings.sets["held_out"], "held-out")
    exact = next((part for part in findings.planted if part.kind == "exact"), None)
    exact_fails = exact is not None and exact.found < 0.9 * exact.planted
    if exact is not None and exact_fails:
        count = f"only {exact.found:,} of {exact.planted:,} exact copies that were planted were found."
        because(count, *_why_exact_fails(findings))
    for part in findings.planted:
        if part.kind in PROMISED and 2 * part.found < part.planted and not exact_fails:  # else it goes without saying
            because(
                f"only {part.found:,} of {part.planted:,} {part.kind} copies that were planted were found: the "
                "generator's would not be found either.",
                "Add images to --held-out, or give all images in their full size.",
            )
    reasons += [difference_sentences(part) for part in findings.differences if part.name not in first]
    if any(part.is_large for part in findings.nearer):
        reasons += [(said, _SAME_SOURCE) for said in _nearer(findings.nearer)]
    return reasons


def _passing(findings: Findings) -> tuple[Share, Share | None]:
    """Return the shares of images that pass for copies by the published measure, of those that the tests judge.

    Returns:
        The share of the generated images, and that of the held-out ones, if there are any that are judged.
    """
    evidence = findings.evidence
    control = None
    if evidence.held_out_judged and evidence.held_out_passing is not None:
        control = share(evidence.held_out_passing, evidence.held_out_judged)
    return share(evidence.passing, max(1, evidence.judged)), control


def _passing_words(findings: Findings, passing: Share) -> str:
    verb = "passes for a copy" if passing.count == 1 else "pass for copies"
    return f"{passing.count:,} of {_judged(findings)} ({percent(passing.share)}) {verb} by the published measure"


def _control_words(findings: Findings, control: Share) -> tuple[str, str]:
    """Count the held-out images that pass for copies, and give the verb that goes with them."""
    images = f"{control.count:,} of {_control_images(findings)} ({percent(control.share)})"
    return images, "does" if control.count == 1 else "do"


_SAVE_ANEW = "The report lists each with what ails it: save them anew, or in another format."
_SAME_SOURCE = "Look at the pairs, and take held-out images from the source of the training images."


def _why_exact_fails(findings: Findings) -> tuple[str, str]:
    """Say why copies that the audit planted itself were not found, and what to do about it."""
    if any(part.name == LEVELS_OF_SET for part in findings.differences):
        return (
            "They were brought to the form of the generated images, in which little is left of them.",
            "Give images as they were generated, with all their shades.",
        )
    if findings.held_out is not None:
        return (
            "Some held-out images are training images, or there are too few of them.",
            "Remove the former from --held-out, or add others.",
        )
    return "Training images are too much alike.", "Give each of them once, in its full size, and add --held-out."


def _doubts(findings: Findings) -> list[Sequence[str]]:
    """Say why a comparison with held-out images names no copies by itself."""
    varied = findings.evidence.named.total - findings.sets["generated"].one_colour
    no_control = [difference_sentences(part) for part in findings.differences if part.compared == "held_out"]
    return [*no_control, *_repeated(varied - findings.evidence.judged, varied, "generated")]


def _uniform(images: SetFacts, kind: str) -> list[Sequence[str]]:
    """Say that most images show one colour, or are equal to one another."""
    if 2 * images.one_colour > images.used:
        return [
            (
                f"{images.one_colour:,} of {images.used:,} {kind} images show one colour only, which tells nothing of "
                "copies.",
                "Leave them out, and audit again.",
            )
        ]
    return _repeated(images.repeated, images.used - images.one_colour, kind)


def _repeated(repeated: int, images: int, kind: str = "") -> list[Sequence[str]]:
    """Say that most images equal another one: then those that differ are seldom independent of one another either.

    Args:
        repeated: images that equal an earlier one, without those of one colour.
        images: images of more than one colour.
        kind: what they are.
    """
    if 2 * repeated > images > 2:
        return [
            (
                f"{repeated:,} of {images:,} {f'{kind} ' if kind else ''}images equal another one of them.",
                "Give images that differ, each of them once.",
            )
        ]
    return []


def _bound_or_control(findings: Findings, *, bound: bool = True) -> str:
    """Say what share of copies there may be all the same, of which kinds, and what was not looked for.

    Args:
        findings: the figures.
        bound: whether there is such a share: where nothing is decided, none is known.
    """
    kinds = [part.kind for part in claimed(findings.planted)]
    weak = [part for part in findings.planted if part.kind not in kinds] if kinds else []
    sentences = reviewed(findings)
    readable = " that can be read" if findings.sets["generated"].skipped else ""
    if bound and findings.fewer_than is not None:
        sentences.append(
            f"With 95 % confidence, fewer than {percent(findings.fewer_than)} of this generator's images{readable} are "
            f"{_listed(kinds, 'or')} copies; this allows for the share of planted copies that is not found."
        )
    if unread := len(findings.sets["train"].skipped):
        images, them = ("image", "it") if unread == 1 else ("images", "them")
        sentences.append(f"{unread:,} training {images} could not be read: copies of {them} are not found.")
    for part in weak:
        sentences.append(
            f"Nothing is said of {part.kind} copies: {part.found:,} of {part.planted:,} planted were found."
        )
    sentences += not_looked_for(findings)
    sentences.append(f"Not looked for are {UNSEEN}.{_reshaped(findings)}{_windowed(findings)}")
    return " ".join(sentences) + _control(findings)


def not_looked_for(findings: Findings) -> list[str]:
    """Say which kinds of copies were not looked for, and why: a sentence for each reason."""
    kinds = {
        "degraded copies (blurred, noisy, strongly compressed)": findings.not_degraded,
        "moved copies (shifted, turned, zoomed)": findings.not_moved,
    }
    reasons = dict.fromkeys(reason for reason in kinds.values() if reason)
    left_out = {reason: [kind for kind, own in kinds.items() if own == reason] for reason in reasons}
    return [f"{_sentence(' and '.join(own))} were not looked for: {reason}." for reason, own in left_out.items()]


def _reshaped(findings: Findings) -> str:
    """Say that training images had another shape, and that copies of how else they might have been read go unseen."""
    train, fit = findings.sets["train"], findings.settings.get("fit")
    shapes = [tuple(map(int, size.split("x"))) for size in train.origin.sizes]
    other = sum(
        abs(width * train.height - height * train.width) > 0.02 * width * train.height for width, height in shapes
    )
    if not other or fit is None:
        return ""
    done, else_done = ("cropped", "stretched") if fit == "crop" else ("stretched", "cropped")
    return (
        f" Training images of another shape were {done}, as --fit says: if the generator saw them {else_done}, audit "
        f"again with --fit {'stretch' if fit == 'crop' else 'crop'}, for its copies may go unseen here."
    )


def _windowed(findings: Findings) -> str:
    """Say that values beyond the window of DICOM files are lost, which the generator may have seen."""
    if WINDOWED not in findings.sets["train"].origin.kinds or WINDOWED in findings.sets["generated"].origin.kinds:
        return ""
    return (
        " Training images are shown in the window that each DICOM file names: if the generator saw them in another, "
        "audit again with --range LOW:HIGH or --range full, for its copies may go unseen here."
    )


def _kinds(findings: Findings) -> str:
    """Break the named images down by what they are."""
    rest = {
        "identical": "a training image in every pixel",
        "plain": "near to one in its place and colours",
        "recoloured": "mirrored, turned by right angles or recoloured",
        "degraded": "blurred, noisy or compressed",
        "moved": "shifted, turned or zoomed",
    }
    parts, all_count = [], not not_counted(findings)
    kinds = findings.evidence.by_search if all_count else findings.evidence.sure_by_search
    for name, words in rest.items():
        count = kinds.get(name, 0)
        verbs = ("equals", "equal") if name == "identical" else ("is", "are")
        if count:
            parts.append(f"{count:,} {verbs[count != 1]} {words}")
    text = f"{_sentence(', '.join(parts))}."
    if findings.evidence.discovered and all_count:
        text += (
            f" {findings.evidence.discovered:,} of them were named by comparison with held-out images, at a level of "
            f"{percent(findings.evidence.false_finds)} false finds on average: measured in simulations, not proved."
        )
    return text


def named_above(findings: Findings) -> list[str]:
    """Say why more images are named than lie below the limits: a limit judges each image as if it were the only one.

    Returns:
        A sentence, or none where all that are named lie below a limit.
    """
    evidence = findings.evidence
    rest = evidence.named_by_number + evidence.named_by_pixels
    it = "it equals" if rest == 1 else "they equal"
    by_number = "so many images lie so near to a training image, but so few held-out ones"
    by_pixels = f"{it} a training image once the disguise is undone"
    counts = {by_number: evidence.named_by_number, by_pixels: evidence.named_by_pixels}
    reasons = [reason for reason, count in counts.items() if count]
    if not reasons:
        return []
    if len(reasons) == 2:
        reasons = [f"{reason} ({counts[reason]:,})" for reason in reasons]
    total, alone = evidence.named.count, evidence.named.count - rest
    if total == 1:
        are = "It would not be noticed alone; it is"
    elif alone:
        are = f"Only {alone:,} of the {total:,} would be noticed alone; the {'other is' if rest == 1 else 'others are'}"
    else:
        are = f"None of the {total:,} would be noticed alone; they are"
    return [f"{are} named since {', or since '.join(reasons)}."]


def reviewed(findings: Findings) -> list[str]:
    """Say what a person has decided, see :func:`~lightning_iet.audit.pairs.apply_review`: a sentence, or none."""
    confirmed, dismissed = findings.evidence.confirmed, findings.evidence.dismissed
    if not confirmed + dismissed:
        return []
    return [
        f"A person has looked at pairs (--review): {confirmed:,} confirmed, and {dismissed:,} dismissed, which are "
        "neither named nor noticed here, whatever their ratio."
    ]


def _control(findings: Findings) -> str:
    if not findings.evidence.held_out_judged or findings.evidence.held_out_noticed is None:
        return ""
    noticed = findings.evidence.held_out_noticed
    verb = "lies" if noticed == 1 else "lie"
    return (
        f" Of {_held_out(findings):,} held-out images, which nobody copied, {noticed:,} {verb} nearer to one training "
        f"image than {limits_words(findings)} times the next."
    )


def beyond_words(findings: Findings) -> str:
    """Say how many images are nearer than any held-out image; the list of pairs marks as many.

    Returns:
        A sentence behind a space, or nothing.
    """
    count = findings.evidence.beyond
    if not count:
        return ""
    is_one = count == 1
    return (
        f" {count:,} generated {'image is' if is_one else 'images are'} nearer to a training image than any of "
        f"{_control_images(findings)}, and {'is' if is_one else 'are'} marked in the list of pairs."
    )


def limits_words(findings: Findings) -> str:
    """Say below which ratio an image is noticed, by each search."""
    limits = findings.evidence.noticed_below
    if len(set(limits.values())) == 1:
        return f"{next(iter(limits.values())):.2f}"
    return _listed([f"{limit:.2f} ({name})" for name, limit in limits.items()], "or")


def _contaminated(findings: Findings) -> str:
    """Warn of held-out images that are training images."""
    found = findings.held_out.identical if findings.held_out else 0
    if not found:
        return ""
    images = "held-out image equals" if found == 1 else "held-out images equal"
    return (
        f" Beware: {found:,} {images} a training image in every pixel. What was trained on is no control, and hides "
        "copies: remove such images from --held-out, and audit again."
    )


def _nearer(nearer: Sequence[Nearer]) -> list[str]:
    """Say in one sentence by which measures images lie nearer to training images; nothing where there are none."""
    compared = []
    for part in nearer:
        values = [percent(value) if part.is_share else f"{value:.4g}" for value in (part.generated, part.held_out)]
        compared.append(f"{part.name}: {values[0]} against {values[1]}")
    if not compared:
        return []
    return [f"the images lie nearer to training images than held-out images do ({'; '.join(compared)})."]


def _loss(membership: Membership | None) -> list[str]:
    if membership is None or not _tells(membership):
        return []
    return [f"Loss: gives its training images away, AUC {membership.auc:.3f}."]


def _tells(membership: Membership) -> bool:
    return loss_tells(membership.auc, membership.auc_low, members=membership.train, others=membership.held_out)


def _counted(part: Share) -> str:
    return f"{part.count:,} of {part.total:,} generated images ({percent(part.share)})"


def _held_out(findings: Findings) -> int:
    return 0 if findings.held_out is None else findings.held_out.copies.total


def _judged(findings: Findings) -> str:
    """Count the generated images that the tests judge: "different" ones, where some are equal or of one colour."""
    count, total = findings.evidence.judged, findings.evidence.named.total
    return f"{count:,} {'' if count == total else 'different '}generated images"


def _control_images(findings: Findings, noun: str = "images") -> str:
    """Count the held-out images that they are compared with."""
    count = findings.evidence.held_out_judged or 0
    return f"{count:,} {'' if count == _held_out(findings) else 'different '}held-out {noun}"


def _listed(words: Sequence[str], joint: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {joint} {words[-1]}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def remarks(facts: SetFacts) -> list[str]:
    """Say how a set was read, where that is not plain: pages, ranges, what could not be read.

    Returns:
        Sentences without the name of the set.
    """
    origin, lines = facts.origin, []
    if facts.left_alone:
        lines.append(f"Beside the {facts.found:,} images these were left alone: {facts.left_alone}.")
    if origin.pages:
        lines.append(
            f"{origin.pages:,} images are pages of files that hold several; --pages first takes the first ones."
        )
    if origin.value_range is not None and origin.values is not None and origin.value_range != (0, 1):
        (low, high), (least, most) = origin.value_range, origin.values
        other = " (1 in floating point)" if origin.mixed else ""
        lines.append(
            f"{origin.deep:,} images of more than 8 bits, with values from {least:g} to {most:g}, were read with black "
            f"at {low:g} and white at {high:g}{other}; --range says otherwise."
        )
    if facts.one_colour:
        lines.append(
            f"{facts.one_colour:,} of {facts.used:,} images show one colour only, which tells nothing of copies."
        )
    if repeated := _repeated(facts.repeated, facts.used - facts.one_colour):
        lines.append(repeated[0][0])
    if facts.skipped:
        lines.append(f"{len(facts.skipped):,} of {facts.found:,} could not be read: {listed(facts.skipped)}.")
    return lines


# --- the table --------------------------------------------------------------------------------------------------------


def findings_table(findings: Findings) -> Table:
    """Lay out the counts of the generated images beside those of the held-out ones."""
    words = verdict(findings)
    details = words.details
    if findings.membership is not None:
        details += f"\n{membership_words(findings.membership)}"
    table = Table(title=words.headline, caption=details, title_justify="left", caption_justify="left")
    header, *body = rows(findings)
    for column, text in enumerate(header):
        table.add_column(text, justify="right" if column else "left")
    for cells in body:
        table.add_row(*cells)
    return table


def rows(findings: Findings) -> list[list[str]]:
    """Return a header and the lines of the table, as text."""
    sets = [findings.generated] + ([] if findings.held_out is None else [findings.held_out])
    ratio, evidence = f"{findings.settings['ratio']:.3g}", findings.evidence
    lines = [["", "generated", "held-out"][: len(sets) + 1]]
    lines.append(["images", *(f"{part.copies.total:,}" for part in sets)])
    named, alike = counted(findings), [] if len(sets) == 1 else [f"{evidence.held_out_alike:,} as near"]
    if rest := evidence.named.count - named.count:
        lines.append(["named as copies", _cell(named), *("" for _ in alike)])
        lines.append(["not counted: named only by a comparison that is doubted", f"{rest:,}", *alike])
    else:
        lines.append(["named as copies, all judged together", _cell(named), *alike])
    noticed = [_cell(evidence.noticed)] + ([] if len(sets) == 1 else [f"{evidence.held_out_noticed:,}"])
    lines.append([f"noticed, each judged alone: ratio < {limits_words(findings)}", *noticed])
    if evidence.held_out_judged:
        once = "" if evidence.beyond_judged == evidence.beyond else ", equal ones counted once"
        chance = evidence.judged / (evidence.held_out_judged + 1)
        beyond = [f"{evidence.beyond_judged:,}", f"up to {chance:.1f} by chance"]
        lines.append([f"nearer than any held-out image{once}", *beyond])
    if findings.measure == "distinct":
        lines.append([f"d1/d2 < {ratio}, near-duplicates counted once", *(_cell(part.copies) for part in sets)])
    lines.append([f"d1/d2 < {ratio} (memorized fraction)", *(_cell(part.memorized_fraction) for part in sets)])
    for threshold in ("0.15", "0.3"):
        shares = (_cell(part.memorized_quantity[threshold]) for part in sets)
        lines.append([f"D1/mean of {findings.settings['k']} < {threshold} (memorized quantity)", *shares])
    lines.append(["identical in every pixel", *(f"{part.identical:,}" for part in sets)])
    lines.append(["median distance to the nearest training image", *(f"{part.median_distance:.4g}" for part in sets)])
    return lines + _directions(sets)


def _directions(sets: list[SetFindings]) -> list[list[str]]:
    """Lines about features that are compared by their angle, where there are any."""
    lines = []
    distances = [part.average_minimum_distance for part in sets if part.average_minimum_distance is not None]
    if distances:
        lines.append(["average minimum cosine distance (AMD)", *(f"{distance:.4g}" for distance in distances)])
    similar = [part.sscd for part in sets if part.sscd is not None]
    if similar:
        lines.append(["SSCD similarity, 95th percentile", *(f"{part.quantile_95:.3f}" for part in similar)])
        lines.append(["SSCD similarity > 0.5", *(_cell(part.above) for part in similar)])
    return lines


def _cell(part: Share) -> str:
    return f"{part.count:,} ({percent(part.share)})"
