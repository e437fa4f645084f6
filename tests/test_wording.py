"""Numbers of things read as one would write them."""

import pytest

from ddt_fast.wording import plural


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "image", "1 image"),
        (0, "image", "0 images"),
        (50_000, "image", "50,000 images"),
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
    ],
)
def test_one_is_singular(number, noun, text):
    assert plural(number, noun) == text
