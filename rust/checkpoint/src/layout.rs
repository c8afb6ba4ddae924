//! The header and the places of a file that is to be written: byte for byte what `safetensors.save_file` writes.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::header::{MAX_HEADER_BYTES, check_name};

/// A tensor that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
}

/// The place of a tensor in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Index in the list that the layout was made from.
    pub index: usize,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Number of bytes.
    pub nbytes: u64,
}

/// The plan of a whole file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The bytes before the data: length and JSON, padded with spaces to a multiple of 8.
    pub head: Vec<u8>,
    /// The tensors in the order of their data.
    pub placed: Vec<Placed>,
    /// Size of the file.
    pub size_bytes: u64,
}

impl Layout {
    /// Lays `tensors` out, sorted by dtype (descending in the order of [`Dtype`]) and name.
    ///
    /// # Errors
    /// A name stands twice or is not allowed, a shape overflows, or the header is longer than a reader accepts.
    pub fn new(tensors: &[TensorSpec], metadata: &BTreeMap<String, String>) -> Result<Self> {
        let mut seen = HashSet::new();
        for tensor in tensors {
            check_name(&tensor.name).map_err(Error::Plan)?;
            if tensor.name == "__metadata__" || !seen.insert(&tensor.name) {
                return Err(Error::Plan(format!("tensor {:?}: the name is taken", tensor.name)));
            }
        }
        let mut order: Vec<usize> = (0..tensors.len()).collect();
        order.sort_by(|left, right| {
            let (left, right) = (&tensors[*left], &tensors[*right]);
            right.dtype.cmp(&left.dtype).then_with(|| left.name.cmp(&right.name))
        });
        let mut placed = place(tensors, &order)?;
        let head = head(tensors, &placed, metadata)?;
        let start = head.len() as u64;
        for place in &mut placed {
            place.offset += start;
        }
        let size_bytes = placed.last().map_or(start, |place| place.offset + place.nbytes);
        Ok(Self { head, placed, size_bytes })
    }
}

/// Places counted from the start of the data.
fn place(tensors: &[TensorSpec], order: &[usize]) -> Result<Vec<Placed>> {
    let mut offset = 0_u64;
    let mut placed = Vec::with_capacity(order.len());
    for index in order {
        let TensorSpec { name, dtype, shape } = &tensors[*index];
        let too_large =
            || Error::Plan(format!("tensor {name:?}: shape {shape:?} of {} has no size in bytes", dtype.name()));
        let nbytes = dtype.size_bytes(shape).ok_or_else(too_large)?;
        placed.push(Placed { index: *index, offset, nbytes });
        offset = offset.checked_add(nbytes).filter(|end| *end < 1 << 62).ok_or_else(too_large)?;
    }
    Ok(placed)
}

fn head(tensors: &[TensorSpec], placed: &[Placed], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut json = String::from("{");
    if !metadata.is_empty() {
        let pairs = serde_json::to_string(metadata).map_err(|error| Error::Plan(format!("metadata: {error}")))?;
        json.push_str("\"__metadata__\":");
        json.push_str(&pairs);
    }
    for place in placed {
        let TensorSpec { name, dtype, shape } = &tensors[place.index];
        let name = serde_json::Value::from(name.as_str());
        let shape = serde_json::Value::from(shape.clone());
        let comma = if json.len() > 1 { "," } else { "" };
        let (dtype, end) = (dtype.name(), place.offset + place.nbytes);
        let entry = write!(
            json,
            r#"{comma}{name}:{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{},{end}]}}"#,
            place.offset
        );
        entry.map_err(|error| Error::Plan(error.to_string()))?;
    }
    json.push('}');
    let length = json.len().next_multiple_of(8);
    if length as u64 > MAX_HEADER_BYTES {
        return Err(Error::Plan(format!(
            "a file of {} tensors has a header of {length} bytes; use smaller shards",
            tensors.len()
        )));
    }
    let mut head = (length as u64).to_le_bytes().to_vec();
    head.extend_from_slice(json.as_bytes());
    head.resize(8 + length, b' ');
    Ok(head)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use safetensors::tensor::{TensorView, serialize};

    use super::*;

    fn theirs(dtype: Dtype) -> safetensors::Dtype {
        serde_json::from_value(serde_json::Value::from(dtype.name())).unwrap_or_else(|error| unreachable!("{error}"))
    }

    #[test]
    fn dtypes_have_the_order_and_size_of_the_safetensors_crate() {
        for pair in Dtype::ALL.windows(2) {
            assert!(pair[0] < pair[1] && theirs(pair[0]) < theirs(pair[1]), "{pair:?}");
        }
        for dtype in Dtype::ALL {
            assert_eq!(dtype.bits(), theirs(dtype).bitsize() as u64, "{dtype:?}");
        }
    }

    fn spec() -> impl Strategy<Value = TensorSpec> {
        let name = "[a-z\"\\\\/\u{e9}\u{4e2d}.]{1,6}";
        (name, prop::sample::select(&Dtype::ALL[..]), prop::collection::vec(0_u64..5, 0..4)).prop_map(
            |(name, dtype, mut shape)| {
                if dtype.bits() % 8 != 0 {
                    shape.push(8);
                }
                TensorSpec { name, dtype, shape }
            },
        )
    }

    proptest! {
        #[test]
        fn the_head_is_that_of_the_safetensors_crate(specs in prop::collection::vec(spec(), 0..8), with_metadata: bool) {
            let unique: BTreeMap<String, TensorSpec> = specs.into_iter().map(|spec| (spec.name.clone(), spec)).collect();
            let specs: Vec<TensorSpec> = unique.into_values().rev().collect();
            let pairs = with_metadata.then(|| ("format".to_owned(), "pt".to_owned()));
            let metadata: BTreeMap<_, _> = pairs.clone().into_iter().collect();
            let layout = Layout::new(&specs, &metadata).map_err(|error| TestCaseError::fail(error.to_string()))?;

            let zeros = vec![0; 4096];
            let views: Vec<_> = specs.iter().map(|spec| {
                let size = usize::try_from(spec.dtype.size_bytes(&spec.shape).unwrap_or(0)).unwrap_or(0);
                let shape = spec.shape.iter().map(|size| usize::try_from(*size).unwrap_or(0)).collect();
                (&spec.name, TensorView::new(theirs(spec.dtype), shape, &zeros[..size]).unwrap_or_else(|error| unreachable!("{error}")))
            }).collect();
            let pairs: Option<HashMap<_, _>> = pairs.map(|pair| HashMap::from([pair]));
            let file = serialize(views, pairs).map_err(|error| TestCaseError::fail(error.to_string()))?;

            prop_assert_eq!(layout.size_bytes, file.len() as u64);
            prop_assert_eq!(String::from_utf8_lossy(&layout.head), String::from_utf8_lossy(&file[..layout.head.len()]));
        }
    }

    #[test]
    fn a_name_that_stands_twice_is_refused() {
        let spec = TensorSpec { name: "a".to_owned(), dtype: Dtype::U8, shape: vec![] };
        assert!(Layout::new(&[spec.clone(), spec], &BTreeMap::new()).is_err());
    }
}
