"""Draw the figure of docs/concepts.md: `python docs/figures/draw.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

IMAGES, PIXELS, TRIALS = (1, 2, 4, 8, 16, 32, 64), 256, 4000
BRIGHTNESS, CONTRAST = 0.6, 0.3  # spread of an image's mean, and of the logarithm of its standard deviation


def errors(images: int) -> tuple[float, float]:
    """Return the root mean square errors of a batch's mean and standard deviation, in standard deviations of all data."""
    random = np.random.default_rng(images)
    center = BRIGHTNESS * random.standard_normal((TRIALS, images, 1))
    spread = np.exp(CONTRAST * random.standard_normal((TRIALS, images, 1)))
    x = (center + spread * random.standard_normal((TRIALS, images, PIXELS))).reshape(TRIALS, -1)
    everything = np.sqrt(BRIGHTNESS**2 + np.exp(2 * CONTRAST**2))
    mean, deviation = x.mean(1) / everything, x.std(1) / everything
    return float(np.sqrt(np.mean(mean**2))), float(np.sqrt(np.mean((deviation - 1) ** 2)))


def main() -> None:
    """Write noise.svg beside this file."""
    found = np.array([errors(images) for images in IMAGES])
    plt.switch_backend("svg")
    plt.rcParams["svg.hashsalt"] = "hvd-syncbn"  # the same file on every run
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(IMAGES, found[:, 0], "o-", color="#00796b", label="mean")
    axes.plot(IMAGES, found[:, 1], "s-", color="#ef6c00", label="standard deviation")
    axes.set(xscale="log", xlabel="images in the batch that is normalized together", ylabel="error, in standard deviations")
    axes.set_xticks(IMAGES, [str(images) for images in IMAGES])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(__file__).with_name("noise.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
