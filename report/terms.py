"""Words of statistics and of measuring, in the words of everybody: shown where they stand on the page."""

from __future__ import annotations

TERMS: dict[str, str] = {
    "p50": "the median: half of the inferences took at most this long",
    "p90": "nine of ten inferences took at most this long (p95 and p99: 95 and 99 of a hundred)",
    "interval": "where the true value lies in 95 of 100 such measurements; the smaller figures in brackets",
    "trusted": "nothing else disturbed the measurement, and it is known as well as was asked for",
    "noisy": "not known as well as was asked for: measuring again may cure it",
    "invalid": "not a latency of this device, however often it is measured",
    "Pareto": "no other bundle is both faster and more accurate, as far as these measurements can show",
    "tie": "the difference is smaller than what these measurements can tell apart",
    "A/A control": "a bundle measured against itself: what is found there is the error of the measurement",
    "float32": "the exported network before it is made smaller: 32 bits a number",
    "end to end": "from the decoded picture to the outputs: preparing the input and one inference",
    "whole frame": "from the decoded picture at its own size to the answer: resized, asked, resized back, in colours",
    "start": "from the start of a process to its first outputs",
    "variant": "a form of the network for one runtime: float32, or smaller",
    "lost": "images that are answered worse than before",
    "won": "images that are answered better than before",
    "points": "percentage points: from 90 % to 89 % is one point",
    "p": "how often chance alone would change at least as many images one way; below 0.05 it hardly was chance",
    "parity": "how far the exported file is from the trained network on real images, at most",
    "signal to noise": "how much larger the outputs are than the error that rounding adds; 20 dB is ten times",
    "balanced": "the mean over the classes, each counted alike however many images it has",
    "calibration error": (
        "how far the confidence is from how often it is right: of the images with 80 % confidence 80 % should be right"
    ),
    "by chance": "what a network whose confidence is exactly right would show on so few images, in 95 of 100 cases",
    "confidence": "the probability that the network gives to its own answer",
    "multiply-accumulates": "products of convolutions and matrices for one image: what a chip has to compute at least",
    "seed": "the number that the random choices of a training begin with; several show what chance does",
    "labels alone": "trained in the same way without a teacher: the control",
}
