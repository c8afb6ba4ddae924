//! Any bytes as the header of a file: no panic; what is accepted is accepted by the safetensors crate too, and lies in
//! the file without a hole.
#![no_main]

use fastft_checkpoint::Header;
use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;

/// Largest file that is built for the other reader.
const LARGEST: u64 = 1 << 16;

fuzz_target!(|input: (u16, &[u8])| {
    let (data_bytes, text) = input;
    let file_bytes = 8 + text.len() as u64 + u64::from(data_bytes);
    let Ok(header) = Header::from_text(text, file_bytes) else { return };
    let mut end = 8 + text.len() as u64;
    for tensor in &header.tensors {
        assert_eq!(tensor.offset, end);
        assert_eq!(tensor.dtype.size_bytes(&tensor.shape), Some(tensor.nbytes));
        end += tensor.nbytes;
    }
    assert_eq!(end, file_bytes);
    if file_bytes > LARGEST {
        return;
    }
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(text);
    file.resize(usize::try_from(file_bytes).unwrap_or(0), 0);
    if let Err(error) = SafeTensors::deserialize(&file) {
        panic!("we read what safetensors refuses: {error}");
    }
});
