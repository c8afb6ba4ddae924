//! Which tensors share a file.

/// Splits tensors of these `sizes` (bytes) into shards of at most `max_shard_bytes`: lists of indices, in order.
///
/// Greedy: a tensor that is larger than a shard gets its own, which comes before the one that is still open; else a
/// tensor that does not fit closes the open shard. No tensors give no shards.
///
/// # Source
/// `huggingface_hub` 2.4, `serialization/_base.py`, `split_state_dict_into_shards_factory`.
#[must_use]
pub fn split_into_shards(sizes: &[u64], max_shard_bytes: u64) -> Vec<Vec<usize>> {
    let mut shards = Vec::new();
    let mut open = Vec::new();
    let mut open_bytes = 0_u64;
    for (index, size) in sizes.iter().enumerate() {
        if *size > max_shard_bytes {
            shards.push(vec![index]);
            continue;
        }
        if open_bytes.saturating_add(*size) > max_shard_bytes {
            shards.push(std::mem::take(&mut open));
            open_bytes = 0;
        }
        open.push(index);
        open_bytes = open_bytes.saturating_add(*size);
    }
    if !open.is_empty() {
        shards.push(open);
    }
    shards
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_large_tensor_comes_before_the_open_shard() {
        assert_eq!(split_into_shards(&[3, 20, 4, 5], 10), [vec![1], vec![0, 2], vec![3]]);
    }

    #[test]
    fn nothing_gives_nothing() {
        assert!(split_into_shards(&[], 10).is_empty());
    }

    proptest! {
        #[test]
        fn shards_partition_the_tensors_and_keep_the_limit(sizes in prop::collection::vec(0_u64..40, 0..60), limit in 1_u64..50) {
            let shards = split_into_shards(&sizes, limit);
            let mut all: Vec<usize> = shards.iter().flatten().copied().collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..sizes.len()).collect::<Vec<_>>());
            for shard in shards {
                let total: u64 = shard.iter().map(|index| sizes[*index]).sum();
                prop_assert!(!shard.is_empty() && (total <= limit || shard.len() == 1));
            }
        }
    }
}
