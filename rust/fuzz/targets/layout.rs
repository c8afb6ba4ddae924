//! Any tensors laid out: the header that is written is read as the same tensors, and shards hold each tensor once.
#![no_main]

use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use fastft_checkpoint::{Dtype, Header, Layout, TensorSpec, split_into_shards};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    tensors: Vec<(String, u8, Vec<u16>)>,
    metadata: BTreeMap<String, String>,
    max_shard_bytes: u32,
}

fuzz_target!(|input: Input| {
    let specs: Vec<_> = input
        .tensors
        .into_iter()
        .map(|(name, dtype, shape)| TensorSpec {
            name,
            dtype: Dtype::ALL[usize::from(dtype) % Dtype::ALL.len()],
            shape: shape.into_iter().map(u64::from).collect(),
        })
        .collect();
    let Ok(layout) = Layout::new(&specs, &input.metadata) else { return };
    if specs.iter().all(|spec| spec.shape.len() <= 8) {
        let read = Header::from_text(&layout.head[8..], layout.size_bytes);
        let header = read.unwrap_or_else(|error| panic!("a header of ours is refused: {error}"));
        let mut read: Vec<_> = header.tensors.iter().map(|found| (&found.name, found.dtype, &found.shape)).collect();
        let mut meant: Vec<_> = specs.iter().map(|spec| (&spec.name, spec.dtype, &spec.shape)).collect();
        read.sort_unstable();
        meant.sort_unstable();
        assert_eq!(read, meant);
        assert_eq!(header.metadata.into_iter().collect::<BTreeMap<_, _>>(), input.metadata);
    }
    let sizes: Vec<_> = layout.placed.iter().map(|placed| placed.nbytes).collect();
    let limit = u64::from(input.max_shard_bytes);
    let shards = split_into_shards(&sizes, limit);
    let mut held: Vec<_> = shards.iter().flatten().copied().collect();
    held.sort_unstable();
    assert!(held.into_iter().eq(0..sizes.len()));
    for shard in shards {
        let total: u64 = shard.iter().map(|index| sizes[*index]).sum();
        assert!(shard.len() == 1 || total <= limit);
    }
});
