"""Class maps as pictures: colours that are told apart, the answer laid over the image, where two answers differ."""

from __future__ import annotations

import numpy as np
import pytest

from kdpipe.runtime.overlay import CHANGED, LOST, SAME, WON, colours, difference, drawn, overlay


def test_every_class_has_a_colour_of_its_own() -> None:
    """No two alike up to all that a byte can name, and the first dozens far apart; a class keeps its own."""
    palette = colours(256).astype(int)
    assert len({tuple(row) for row in palette}) == 256
    some = palette[:24]
    apart = np.abs(some[:, None] - some[None]).sum(2)[~np.eye(24, dtype=bool)]
    assert apart.min() >= 40, apart.min()
    assert (colours(5) == palette[:5]).all() and colours(0).shape == (0, 3)
    with pytest.raises(ValueError, match="257"):
        colours(257)


def test_a_map_over_its_image() -> None:
    """Half the image and half the colour, to a step of rounding; where nothing is said the image as it is."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    classes = generator.integers(0, 256, (7, 9), dtype=np.uint8)
    laid = overlay(image, classes)
    wanted = (image.astype(int) + colours(256)[classes]) / 2
    assert laid.dtype == np.uint8 and np.abs(laid - wanted).max() <= 1
    unsaid = np.where(generator.random((7, 9)) < 0.3, -1, classes.astype(np.int16))
    laid = overlay(image, unsaid)
    assert (laid[unsaid < 0] == image[unsaid < 0]).all()
    assert (laid[unsaid >= 0] == overlay(image, classes)[unsaid >= 0]).all()
    with pytest.raises(ValueError, match="one size"):
        overlay(image, classes[:, :8])


def test_a_map_alone() -> None:
    picture = drawn(np.array([[0, 3], [-1, 1]], np.int16))
    assert (picture[0] == colours(4)[[0, 3]]).all() and (picture[1, 1] == colours(2)[1]).all()
    assert (picture[1, 0] == 255).all()


def test_where_two_maps_differ() -> None:
    first = np.array([[0, 1, 1, 2, 2]], np.uint8)
    second = np.array([[0, 1, 2, 1, 1]], np.uint8)
    labels = np.array([[0, 0, 1, 1, -1]], np.int16)
    [same, wrong, lost, won, unknown] = difference(first, second, labels)[0].tolist()
    assert same == wrong == [SAME] * 3
    assert (lost, won, unknown) == (list(LOST), list(WON), list(CHANGED))
    alone = difference(first, second)[0]
    assert (alone[2:] == colours(3)[[2, 1, 1]]).all() and (alone[:2] == SAME).all()
    with pytest.raises(ValueError, match="one size"):
        difference(first, second[:, :4])
