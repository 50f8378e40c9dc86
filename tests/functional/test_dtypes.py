"""Equal numbers, of whatever dtypes."""

import pytest
import torch

from convsim_init.functional.dtypes import equal

NAN = float("nan")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.tensor([1.5, NAN]), torch.tensor([1.5, NAN], dtype=torch.float8_e5m2), True),
        (torch.tensor([1.0, 2]), torch.tensor([1, 2], dtype=torch.uint16), True),
        (torch.tensor([1.0, 2]), torch.tensor([1, 3], dtype=torch.uint16), False),
        (torch.eye(2), torch.eye(2).to_sparse(), True),
        (torch.ones(1), torch.ones(3), False),
        (torch.ones(2, 3), torch.ones(3, 2), False),
    ],
)
def test_tensors_are_equal_if_their_shapes_and_values_are(a, b, expected):
    assert equal(a, b) == equal(b, a) == expected
