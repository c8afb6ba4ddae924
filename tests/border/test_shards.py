"""`split_into_shards` against huggingface_hub's own split."""

import pytest
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given
from hypothesis import strategies as st

from fastft import _native


def theirs(sizes: list[int], limit: int) -> list[list[int]]:
    split = split_state_dict_into_shards_factory(
        {str(index): index for index in range(len(sizes))},
        get_storage_size=lambda index: sizes[index],
        get_storage_id=lambda _: None,
        filename_pattern="{suffix}",
        max_shard_size=limit,
    )
    return [[int(name) for name in names] for names in split.filename_to_tensors.values()]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(1, 40))
def test_as_huggingface_hub(sizes: list[int], limit: int) -> None:
    assert _native.split_into_shards(sizes, limit) == theirs(sizes, limit)


def test_nothing_and_nonsense() -> None:
    assert _native.split_into_shards([], 1) == []
    with pytest.raises(ValueError, match="at least 1 byte"):
        _native.split_into_shards([1], 0)
    with pytest.raises(OverflowError):
        _native.split_into_shards([-1], 1)
