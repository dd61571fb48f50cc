import numpy as np

from maxlm.data.batch import Batch, empty_batch, join_documents


def test_an_empty_batch_is_padding_in_the_dtypes_that_the_model_reads():
    batch = empty_batch(2, 3)
    assert [field.dtype for field in batch] == [np.int32] * 4 + [np.float32]
    assert all(field.shape == (2, 3) and not field.any() for field in batch)


def test_joined_documents_are_one_segment_and_keep_padding_and_weights():
    batch = Batch(
        tokens=np.array([[5, 6, 7, 0]], np.int32),
        targets=np.array([[6, 7, 0, 0]], np.int32),
        segments=np.array([[1, 1, 2, 0]], np.int32),
        positions=np.array([[0, 1, 0, 0]], np.int32),
        weights=np.array([[1, 0, 0, 0]], np.float32),
    )
    joined = join_documents(batch)
    np.testing.assert_array_equal(joined.segments, [[1, 1, 1, 0]])
    np.testing.assert_array_equal(joined.positions, [[0, 1, 2, 3]])
    assert joined.segments.dtype == joined.positions.dtype == np.int32
    assert joined.tokens is batch.tokens and joined.targets is batch.targets and joined.weights is batch.weights
