"""What theory and published measurements support saying about pruning a data set of a given size, and nothing beyond.

Every `Advice` carries its support and its uncertainty. Where nothing supports a fraction, the advice is to measure.

What this module does not know: whether your images resemble ImageNet or CIFAR. It looks at counts, and at how well the
features tell the classes apart, never at pixels; `protoprune tune` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protoprune.arguments import checked
from protoprune.bounds import check_number, check_whole

# Images a class in the data sets on which the cited results were measured.
IMAGENET_PER_CLASS = 1_281
CIFAR100_PER_CLASS = 500
USELESS_THETA = 80.0  # degrees; 90 is chance
SORSCHER = "Sorscher et al. 2022, arXiv 2206.14486"
OURS = "this project's experiments"
GOOD_KNN = 0.95  # share of k-NN's answers that are right: such features made hard win on Imagenette at 30 % kept
ENOUGH = 750  # images a class there, before pruning
AYED = "Ayed & Hayou 2023, arXiv 2302.06960"


@dataclass(frozen=True)
class Advice:
    """One thing to do, what it rests on, and what that does not establish; the latter two end without a full stop."""

    text: str
    support: str
    uncertainty: str


MOST_IMAGES = 10**12


@checked
def advise(
    images: int,
    classes: int,
    counts: Sequence[int] | None = None,
    probe_quality: float | None = None,
    *,
    knn: float | None = None,
    encoder: str | None = None,
) -> list[Advice]:
    """Advice for `images` labelled images in `classes` classes.

    counts: images of every class, when known. knn: the share of the labels that the nearest neighbours in the features
    get right, and encoder: what made these. probe_quality: the share of the labels that the model behind the score
    gets right, from 0.5 (guessing, in the two-class theory) to 1.
    """
    check_whole("--images", images, 1, MOST_IMAGES)
    check_whole("--classes", classes, 1, images)
    if probe_quality is not None:
        check_number("--probe-quality", probe_quality, 0.5, 1)
    if knn is not None:
        check_number("knn", knn, 0, 1)
    counts = None if counts is None else [check_whole("counts", one, 0, images) for one in counts]
    per_class = images / classes
    theta = None if probe_quality is None else 180 * (1 - probe_quality)
    balance = [_balance(classes, counts)] if classes > 1 else []
    if probe_quality is None or theta is None:
        probe = _any_probe()
    elif theta > USELESS_THETA:
        return [_useless_probe(probe_quality, theta), _tune(knn, encoder), *balance]
    else:
        probe = _this_probe(probe_quality, theta)
    aggressive = _aggressive(per_class, knn)
    return [_order(per_class), _fraction(per_class), aggressive, _tune(knn, encoder), *balance, probe]


def _order(per_class: float) -> Advice:
    """Hard, calibrated or neither, from the number of images a class."""
    if per_class >= 0.9 * IMAGENET_PER_CLASS:
        return Advice(
            f"At 70 to 80 % kept compare HARD with RANDOM: {per_class:,.0f} images a class is as many as ImageNet has, "
            "where hard won, or more; on CIFAR-10 it did not.",
            f"measured on ImageNet (about {IMAGENET_PER_CLASS:,} a class): keeping the images far from their prototype "
            f"matched the best supervised score down to 70-80 % kept ({SORSCHER}); measured here on CIFAR-10 (5,000 "
            f"a class, {OURS}): the hardest 80 and 60 % by EL2N were within .3 points of random, the hardest 40 % lost "
            "3; from pixels a small CNN (4,000 a class) was as good on the hardest 80 % by prototypes as on everything",
            "one data set each, and other encoders and models; where hard starts to win on your data is not known",
        )
    if per_class >= CIFAR100_PER_CLASS:
        return Advice(
            f"Do not expect an order to beat RANDOM by much at light pruning: about {per_class:,.0f} images a class is "
            "fewer than ImageNet has.",
            f"measured on CIFAR-10 and Imagenette ({OURS}), bundled encoder: at 80 % kept no metric was beyond chance "
            "of random lists; at 50 and 70 % herding by class gains .5 to 1.2 points with heads, no recipe that was "
            "screened won on a network from pixels; but with SSCD, self-supervised and right on 88 %, the hardest 80 "
            "and 70 % of Imagenette gained .4 and .6 and cost nothing with heads (a small CNN from pixels: -.4)",
            "heads and small networks; `protoprune tune` shows whether hard wins with your encoder",
        )
    return Advice(
        f"Do not keep hard examples only: about {per_class:,.0f} images a class is little. If you must prune, prune at "
        "RANDOM or by COVER, and try others against random on held-out data.",
        f"measured ({OURS}): on Tiny ImageNet (80 a class) the hardest 30 % lost 2 to 5 points to random, and the "
        "hardest 80 % cost .7 to 1.9 points; theory, perfect probe, half of the data kept: easy beats hard below "
        "alpha_tot 5.0, and random beats hard of the same size below alpha_prune 1.5",
        "whether easy pays depends on the score: with EL2N of a trained model it did on 1,000 images of CIFAR-10, with "
        "prototypes it lost 4 to 9 points at 10 % kept",
    )


def _fraction(per_class: float) -> Advice:
    """Which fractions are safe, as far as anyone measured."""
    if per_class >= 0.9 * IMAGENET_PER_CLASS:
        return Advice(
            "Keeping 80 % is the safe first choice. Between 80 % and 30 % compare with a random list of the same size "
            "before you trust the result.",
            f"measured: about 20 % of ImageNet can go at no cost, with self-supervised prototypes ({SORSCHER}); "
            "theory: from alpha_tot 5 on the easiest 20 % cost under 1 % of the error, with a probe within 20 degrees",
            "one data set; yours may hold more or fewer redundant images, so compare with all images once",
        )
    return Advice(
        "No fraction can be called safe in advance at this size: take off a little, and compare "
        "with a random list of the same size and with all images.",
        f"no measurement: the result cited here for pruning at no cost is ImageNet's, {IMAGENET_PER_CLASS:,} a class",
        "smaller data may hold redundant images too; nothing here says how many",
    )


def _aggressive(per_class: float, knn: float | None = None) -> Advice:
    """What to do at 30 % kept or less; features of high quality on many images are an exception that was measured."""
    kept = f"At 30 % kept or less (here {0.3 * per_class:,.0f} images a class)"
    if knn is not None and knn >= GOOD_KNN and per_class >= ENOUGH:
        return Advice(
            f"{kept} try HARD beside COVER: with features as good as yours (k-NN right on {knn:.0%}) it was as good.",
            f"measured on Imagenette, EfficientNet-Lite0, 757 images a class ({OURS}): hardest by prototypes at 30 % "
            "kept .4 points above random over five draws (balance 0.5); without balance over ten .3, and cover .2, "
            "neither certain; at 10 % hard lost .5 and 1, at 5 % 8",
            "one data set, whose classes the encoder had seen; on CIFAR-10, which it had not, hard lost 1.2 at 30 %",
        )
    return Advice(
        f"{kept} do not keep hard examples only: COVER each class (`select --order cover`), or take RANDOM images.",
        f"measured ({OURS}), converged heads on the bundled encoder's features of CIFAR-10, Imagenette and Tiny "
        "ImageNet: kernel herding by class beats random by 9 to 12 points at 5 % kept, 5 to 11 at 10 % and 2 to 6 at "
        "30 %, the hardest lose 14 to 26, 17 to 22 and 5 to 18; a CNN from pixels gains less, at 5 % 4 to 5 with "
        "facility location and 2 to 4 with herding; random beats score-only pruning at 30 % kept or less "
        f"({AYED})",
        "small images, small networks, weak features: with EfficientNet-Lite0's herding gains 4 and 11 (CIFAR-10, Tiny "
        "ImageNet), 3 and 5, and 1; where that encoder knows the classes (Imagenette) cover and facility location are "
        "within a point of random from 5 % on, and the hardest lose 8 at 5 %, 1 at 10 % and nothing at 30 %; "
        "calibration (--calibrate) saves a score from collapse, and was above random, by .6 points, there alone",
    )


def _tune(knn: float | None, encoder: str | None) -> Advice:
    """Measure rather than follow a rule."""
    known = "" if knn is None else f" Nearest neighbours in your features are right on {knn:.0%} of the labels."
    made = "" if encoder is None else f" of {encoder}"
    return Advice(
        f"Let `protoprune tune --keep F` choose: it compares the recipes on the features{made} that you have, and "
        f"proves the winner against random lists on images that chose nothing.{known}",
        f"measured: which recipe wins depends on the images a class, the fraction and the encoder ({OURS})",
        "heads judge for the space of the features; --model trains networks instead",
    )


def _balance(classes: int, counts: Sequence[int] | None) -> Advice:
    known = ""
    counts = [count for count in counts or () if count]
    if counts:
        ratio = max(counts) / min(counts)
        known = f" Your classes hold {min(counts):,} to {max(counts):,} images, a factor of {ratio:.1f}."
    return Advice(
        f"Split half of what is kept evenly over the {classes:,} classes (`--balance 0.5`).{known}",
        f"measured: every score amplifies class imbalance, and every ImageNet run used a balance of 50 % ({SORSCHER})",
        "0.5 is the published setting, not an optimum for your data",
    )


def _useless_probe(quality: float, theta: float) -> Advice:
    return Advice(
        f"Do not rank with this model: right on {quality:.0%} of the labels, it is close to guessing. Prune at RANDOM.",
        f"theory: that agreement is an angle of {theta:.0f} degrees between probe and teacher, "
        "and at 90 the score knows nothing of the labels",
        "the theory has two classes; with more, a model far above chance may still rank well",
    )


def _this_probe(quality: float, theta: float) -> Advice:
    """The theory's best fractions for a probe at theta degrees, which agrees with the teacher on 1 - theta/180."""
    from protoprune.theory.solver import best_keep

    few, many = (best_keep(alpha_prune=alpha, theta=theta).keep for alpha in (4.0, 16.0))
    return Advice(
        f"With a model that is right on {quality:.0%} of the labels, do not prune to hard examples without limit: "
        f"in the theory the best fraction kept is {few:.0%} when few examples remain and {many:.0%} when many do.",
        f"theory: probe angle {theta:.0f} degrees, absolute margin, alpha_prune 4 and 16, fractions down to 1 % tried",
        "a two-class linear model: rely on the direction (a worse probe asks for keeping more), not on the percentages",
    )


def _any_probe() -> Advice:
    return Advice(
        "If the score comes from a weak or briefly trained model, keep more; --probe-quality says how much more the "
        "theory asks for.",
        "theory: the best fraction kept rises with the angle between probe and teacher (at alpha_prune 8 it is 15 % at "
        "10 degrees, 28 % at 20, 50 % at 40)",
        "self-supervised prototypes predict no labels, so they have no such angle",
    )
