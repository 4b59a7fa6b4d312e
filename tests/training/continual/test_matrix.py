import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.training.continual import AccuracyMatrix


def filled(rows):
    matrix = AccuracyMatrix([f"t{i}" for i in range(len(rows[0]))])
    for i, row in enumerate(rows):
        matrix.add(i, dict(zip(matrix.tasks, row, strict=True)))
    return matrix


def test_the_numbers_by_hand():
    matrix = filled([[0.9, 0.1, 0.0], [0.5, 0.8, 0.2], [0.6, 0.3, 0.7]])
    assert matrix.complete
    assert matrix.final() == pytest.approx((0.6 + 0.3 + 0.7) / 3)
    assert matrix.learning() == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert matrix.forgetting() == pytest.approx((0.3 + 0.5 + 0) / 3)
    assert matrix.backward_transfer() == pytest.approx((-0.3 - 0.5) / 2)
    assert set(matrix.summary()) == {"accuracy", "learning_accuracy", "forgetting", "backward_transfer"}
    assert "90.0" in str(matrix)
    assert matrix.to_dict()["rows"][1] == [0.5, 0.8, 0.2]


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_forgetting_is_what_the_best_lost(rows):
    matrix = filled(rows)
    assert matrix.forgetting() >= -1e-12
    assert matrix.forgetting() >= matrix.learning() - matrix.final() - 1e-12
    if len(rows) > 1:
        assert matrix.backward_transfer() == pytest.approx(
            (matrix.final() - matrix.learning()) * len(rows) / (len(rows) - 1)
        )


def test_faults():
    matrix = AccuracyMatrix(["a", "b"])
    with pytest.raises(UserError, match="empty"):
        matrix.final()
    with pytest.raises(UserError, match="row 0 is next"):
        matrix.add(1, {"a": 1, "b": 1})
    with pytest.raises(UserError, match="accuracy on b is missing"):
        matrix.add(0, {"a": 1})
