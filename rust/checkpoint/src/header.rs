//! The header of a safetensors file: 8 bytes of length, then JSON that names each tensor's dtype, shape and place.

use std::path::Path;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::foreign;
use crate::json::{Document, Entry};
use crate::reader::Input;

/// Longest header that is read: room for some 100,000 tensors. The format itself allows 100 MB.
pub const MAX_HEADER_BYTES: u64 = 16 << 20;

const MAX_NAME_CHARACTERS: usize = 1000;
const MAX_DIMENSIONS: usize = 8;
const LENGTH_BYTES: u64 = 8;

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, free of control characters.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape; empty for a single value.
    pub shape: Vec<u64>,
    /// Where its first byte stands, counted from the start of the file.
    pub offset: u64,
    /// How many bytes it has.
    pub nbytes: u64,
}

/// A checked header: the tensors lie in the file one after the other, without holes or overlaps, up to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The pairs of `__metadata__`, in the order of the file.
    pub metadata: Vec<(String, String)>,
    /// The tensors in the order of their data.
    pub tensors: Vec<TensorInfo>,
}

impl Header {
    /// Opens the file at `path` and reads its header.
    ///
    /// # Errors
    /// The file cannot be opened or read, or is no whole safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(&Input::open(path)?)
    }

    /// Reads the header of an open file.
    ///
    /// # Errors
    /// The file cannot be read or is no whole safetensors file.
    pub fn read(input: &Input) -> Result<Self> {
        let fail = |reason: String| Error::Checkpoint(format!("{}: {reason}", input.path().display()));
        let mut first = [0; 32];
        let first_length = usize::try_from(input.size_bytes().min(32)).unwrap_or(32);
        let first = &mut first[..first_length];
        input.read_at(first, 0)?;
        // The header's own length can begin as a pickle does (640 is 80 02 00 ...); its text begins with a brace.
        let foreign_kind = if first.get(8) == Some(&b'{') { None } else { foreign::recognise(first) };
        if let Some(kind) = foreign_kind {
            return Err(fail(format!("this is {kind}")));
        }
        let Some((length, _)) = first.split_first_chunk::<8>() else {
            return Err(fail(format!("no safetensors file: it has only {} bytes; fetch it again", input.size_bytes())));
        };
        let length = u64::from_le_bytes(*length);
        let data_start = check_length(length, input.size_bytes()).map_err(fail)?;
        let mut text = vec![0; usize::try_from(length).map_err(|error| fail(error.to_string()))?];
        input.read_at(&mut text, LENGTH_BYTES)?;
        parse(&text, data_start, input.size_bytes()).map_err(fail)
    }

    /// Checks the text of a header, of a file of `file_bytes` bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_text(text: &[u8], file_bytes: u64) -> std::result::Result<Self, String> {
        let data_start = check_length(text.len() as u64, file_bytes)?;
        parse(text, data_start, file_bytes)
    }
}

/// Where the data start, if a header of `length` bytes is allowed in a file of `file_bytes`.
fn check_length(length: u64, file_bytes: u64) -> std::result::Result<u64, String> {
    if length < 2 {
        return Err(format!("no safetensors file: its header would have {length} bytes"));
    }
    if length > MAX_HEADER_BYTES {
        return Err(format!(
            "no safetensors file: its header would have {length} bytes, and at most {MAX_HEADER_BYTES} are read"
        ));
    }
    let data_start = LENGTH_BYTES + length;
    if data_start > file_bytes {
        return Err(format!(
            "the file is cut off: the header has {length} bytes, the whole file {file_bytes}; fetch it again"
        ));
    }
    Ok(data_start)
}

/// The tensors of a header text, checked against each other and against the length of the file.
fn parse(text: &[u8], data_start: u64, file_bytes: u64) -> std::result::Result<Header, String> {
    if text.first() != Some(&b'{') {
        return Err("no safetensors file: the header is no JSON object".to_owned());
    }
    let document: Document = serde_json::from_slice(text).map_err(|error| format!("the header is broken: {error}"))?;
    let mut tensors = document
        .entries
        .into_iter()
        .map(|(name, entry)| tensor(name, &entry, data_start))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.nbytes));
    check_places(&tensors, data_start, file_bytes)?;
    Ok(Header { metadata: document.metadata.unwrap_or_default(), tensors })
}

fn tensor(name: String, entry: &Entry, data_start: u64) -> std::result::Result<TensorInfo, String> {
    check_name(&name)?;
    let dtype = Dtype::from_name(&entry.dtype)
        .ok_or_else(|| format!("tensor {name:?}: the dtype {:?} is unknown", entry.dtype))?;
    if entry.shape.len() > MAX_DIMENSIONS {
        return Err(format!(
            "tensor {name:?}: {} dimensions, and at most {MAX_DIMENSIONS} are read",
            entry.shape.len()
        ));
    }
    let (start, end) = entry.data_offsets;
    let size = dtype.size_bytes(&entry.shape);
    if end.checked_sub(start).is_none_or(|nbytes| Some(nbytes) != size) {
        return Err(format!(
            "tensor {name:?}: shape {:?} of {} does not fit the bytes {start} to {end} that it is given",
            entry.shape,
            dtype.name()
        ));
    }
    let offset = data_start.checked_add(start).ok_or_else(|| format!("tensor {name:?}: starts at byte {start}"))?;
    Ok(TensorInfo { name, dtype, shape: entry.shape.clone(), offset, nbytes: end - start })
}

/// Refuses a name that is too long, empty or has control characters in it.
pub(crate) fn check_name(name: &str) -> std::result::Result<(), String> {
    if name.is_empty() || name.chars().any(char::is_control) {
        return Err(format!("tensor {name:?}: a name may not be empty or hold control characters"));
    }
    let characters = name.chars().count();
    if characters > MAX_NAME_CHARACTERS {
        let start: String = name.chars().take(60).collect();
        return Err(format!(
            "tensor {start:?}...: the name has {characters} characters, and at most {MAX_NAME_CHARACTERS} are read"
        ));
    }
    Ok(())
}

/// Refuses holes, overlaps, and data that are shorter or longer than the file. `tensors` are sorted by place.
fn check_places(tensors: &[TensorInfo], data_start: u64, file_bytes: u64) -> std::result::Result<(), String> {
    let mut end = data_start;
    for tensor in tensors {
        let TensorInfo { name, offset, nbytes, .. } = tensor;
        if *offset < end {
            return Err(format!("tensor {name:?} overlaps the one before it"));
        }
        if *offset > end {
            return Err(format!("there is a hole of {} bytes before tensor {name:?}", offset - end));
        }
        end = offset.checked_add(*nbytes).ok_or_else(|| format!("tensor {name:?}: its end overflows"))?;
    }
    match file_bytes.cmp(&end) {
        std::cmp::Ordering::Less => {
            Err(format!("the file is cut off: its header promises {end} bytes, it has {file_bytes}; fetch it again"))
        }
        std::cmp::Ordering::Greater => {
            Err(format!("{} bytes after the last tensor belong to nothing", file_bytes - end))
        }
        std::cmp::Ordering::Equal => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Parses `json` as the header of a file with `data_bytes` bytes of data.
    fn header(json: &str, data_bytes: u64) -> std::result::Result<Header, String> {
        let data_start = LENGTH_BYTES + json.len() as u64;
        parse(json.as_bytes(), data_start, data_start + data_bytes)
    }

    fn refusal(json: &str, data_bytes: u64) -> String {
        header(json, data_bytes).err().unwrap_or_default()
    }

    #[test]
    fn tensors_come_in_the_order_of_their_data() {
        let json = r#"{"b":{"dtype":"F16","shape":[2],"data_offsets":[4,8]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"__metadata__":{"format":"pt"}}"#;
        let header = header(json, 8).unwrap_or_else(|error| unreachable!("{error}"));
        let names: Vec<_> = header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(header.tensors[1].offset, 8 + json.len() as u64 + 4);
        assert_eq!(header.metadata, [("format".to_owned(), "pt".to_owned())]);
    }

    #[test]
    fn every_fault_is_named() {
        let cases = [
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                4,
                "stands twice",
            ),
            (r#"{"__metadata__":{"x":"1","x":"2"}}"#, 0, "stands twice"),
            (r#"{"__metadata__":{"x":1}}"#, 0, "expected a string"),
            (r#"{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}"#, 4, "dtype \"F33\" is unknown"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4, "does not fit"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4, "does not fit"),
            (r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#, 4, "does not fit"),
            (r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#, 1, "does not fit"),
            (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4, "tensor \\\"a\\\""),
            (r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#, 4, "header is broken"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#, 4, "unknown field"),
            (r#"{"a":{"dtype":"F32","shape":[1]}}"#, 4, "missing field"),
            (r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}"#, 4, "9 dimensions"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 3, "cut off"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 5, "belong to nothing"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8, "a hole of 4 bytes"),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#,
                6,
                "overlaps",
            ),
            (r#"{"a\nb":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4, "control characters"),
            (r#"{"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4, "may not be empty"),
            (
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615]}}"#,
                4,
                "starts at byte",
            ),
            ("[]", 0, "no JSON object"),
            (r#"{"a":"#, 0, "header is broken"),
            ("{} {}", 0, "header is broken"),
        ];
        for (json, data_bytes, reason) in cases {
            let message = refusal(json, data_bytes);
            assert!(message.contains(reason) || message.contains(&reason.replace("\\\"", "\"")), "{json}: {message}");
        }
    }

    #[test]
    fn a_long_name_is_refused_without_printing_it_all() {
        let json = format!(r#"{{"{}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#, "x".repeat(1001));
        let message = refusal(&json, 1);
        assert!(message.contains("1001 characters") && message.len() < 200, "{message}");
    }

    #[test]
    fn header_lengths_are_bounded() {
        assert_eq!(check_length(2, 10), Ok(10));
        assert!(check_length(1, 10).is_err());
        assert!(check_length(3, 10).is_err());
        assert!(check_length(u64::MAX, 10).is_err());
        assert!(check_length(MAX_HEADER_BYTES + 1, u64::MAX).is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\{[ -~]{0,200}") {
            let _ = header(&text, 8);
        }
    }
}
