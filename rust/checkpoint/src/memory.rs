//! Tensors that lie in memory, into a file and back: by position, on several threads, without a second copy.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::error::{Error, Result};
use crate::layout::{Layout, TensorSpec};
use crate::reader::Input;
use crate::writer::Output;

/// Bytes that one system call moves.
const PIECE_BYTES: usize = 8 << 20;

/// Writes a new safetensors file: byte for byte what `safetensors.save_file` makes of the same tensors. Gives its size.
///
/// The file is not flushed to the disk; whoever publishes it does that.
///
/// # Arguments
/// * `data`: the bytes of each tensor, row-major and little-endian.
/// * `watch`: called in the calling thread before each piece that it writes; `Break` stops the writing.
///
/// # Errors
/// The layout is refused (see [`Layout::new`]), the bytes of a tensor are not those of its shape, there is such a file
/// already, the disk refuses, or `watch` stopped it; then a part of the file may be left.
pub fn write_file(
    path: &Path,
    tensors: &[TensorSpec],
    data: &[&[u8]],
    metadata: &BTreeMap<String, String>,
    threads: usize,
    watch: &(dyn Fn() -> ControlFlow<()> + Sync),
) -> Result<u64> {
    let layout = Layout::new(tensors, metadata)?;
    let mut pieces: Vec<(&[u8], u64)> = vec![(&layout.head, 0)];
    for placed in &layout.placed {
        let name = &tensors[placed.index].name;
        let bytes = data.get(placed.index).copied().unwrap_or_default();
        if bytes.len() as u64 != placed.nbytes {
            let problem = format!("tensor {name:?}: {} bytes, but its shape has {}", bytes.len(), placed.nbytes);
            return Err(Error::Plan(problem));
        }
        let mut offset = placed.offset;
        for piece in bytes.chunks(PIECE_BYTES) {
            pieces.push((piece, offset));
            offset += piece.len() as u64;
        }
    }
    let output = Output::create(path, layout.size_bytes)?;
    // In the order of the file: the last piece, which waits for all others, is then the last to be taken.
    let next = AtomicUsize::new(0);
    on_threads(threads.min(pieces.len()), |thread| {
        while let Some((piece, offset)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            if thread == 0 && watch().is_break() {
                output.give_up();
                next.store(pieces.len(), Ordering::Relaxed);
                return Err(Error::File(format!("{}: stopped before it was whole", path.display())));
            }
            output.write_at(piece, *offset).inspect_err(|_| output.give_up())?;
        }
        Ok(())
    })?;
    Ok(layout.size_bytes)
}

/// Fills `target` with the bytes of `input` from `offset` on.
///
/// # Errors
/// The file ends too early or cannot be read.
pub fn read_into(input: &Input, offset: u64, target: &mut [u8], threads: usize) -> Result<()> {
    let threads = threads.clamp(1, target.len().div_ceil(PIECE_BYTES).max(1));
    let mut shares: Vec<Vec<(&mut [u8], u64)>> = (0..threads).map(|_| Vec::new()).collect();
    let mut place = offset;
    for (index, piece) in target.chunks_mut(PIECE_BYTES).enumerate() {
        let length = piece.len() as u64;
        shares[index % threads].push((piece, place));
        place = place.saturating_add(length);
    }
    let failed = AtomicBool::new(false);
    let read = |share: Vec<(&mut [u8], u64)>| {
        for (piece, place) in share {
            if failed.load(Ordering::Relaxed) {
                break;
            }
            input.read_at(piece, place).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    };
    let mut shares = shares.into_iter();
    let own = shares.next();
    thread::scope(|scope| {
        let others: Vec<_> = shares.map(|share| scope.spawn(|| read(share))).collect();
        joined(own.map_or(Ok(()), read), others)
    })
}

/// Runs `work` on so many threads, this one among them; the first failure of them all.
fn on_threads(threads: usize, work: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let work = &work;
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|index| scope.spawn(move || work(index))).collect();
        joined(work(0), others)
    })
}

fn joined(own: Result<()>, others: Vec<thread::ScopedJoinHandle<'_, Result<()>>>) -> Result<()> {
    let mut result = own;
    for other in others {
        match other.join() {
            Ok(done) => result = result.and(done),
            Err(payload) => std::panic::resume_unwind(payload),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::{TensorView, serialize};

    use super::*;
    use crate::dtype::Dtype;

    type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

    fn go_on() -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn spec(name: &str, dtype: Dtype, length: u64) -> TensorSpec {
        TensorSpec { name: name.to_owned(), dtype, shape: vec![length] }
    }

    #[test]
    fn a_file_is_that_of_the_safetensors_crate_for_every_number_of_threads() -> Outcome {
        let folder = tempfile::tempdir()?;
        let large: Vec<u8> = (0..3 * PIECE_BYTES + 5).map(|index| u8::try_from(index % 251).unwrap_or(0)).collect();
        let views = [
            ("large", TensorView::new(safetensors::Dtype::U8, vec![large.len()], &large)?),
            ("empty", TensorView::new(safetensors::Dtype::F32, vec![0], &[])?),
            ("small", TensorView::new(safetensors::Dtype::F16, vec![2], &large[7..11])?),
        ];
        let expected = serialize(views, None)?;
        let specs =
            [spec("large", Dtype::U8, large.len() as u64), spec("empty", Dtype::F32, 0), spec("small", Dtype::F16, 2)];
        let data: [&[u8]; 3] = [&large, &[], &large[7..11]];
        for threads in [1, 2, 5] {
            let path = folder.path().join(threads.to_string());
            assert_eq!(write_file(&path, &specs, &data, &BTreeMap::new(), threads, &go_on)?, expected.len() as u64);
            assert!(std::fs::read(&path)? == expected, "{threads} threads");
            let mut back = vec![0; expected.len() - 11];
            read_into(&Input::open(&path)?, 11, &mut back, threads)?;
            assert!(back == expected[11..], "{threads} threads");
        }
        Ok(())
    }

    #[test]
    fn a_write_is_stopped_in_the_middle() -> Outcome {
        let folder = tempfile::tempdir()?;
        let large = vec![7; 4 * PIECE_BYTES];
        for threads in [1, 3] {
            let path = folder.path().join(threads.to_string());
            let specs = [spec("large", Dtype::U8, large.len() as u64)];
            let problem = write_file(&path, &specs, &[&large], &BTreeMap::new(), threads, &|| ControlFlow::Break(()));
            assert!(matches!(problem, Err(Error::File(text)) if text.contains("stopped before it was whole")));
            assert!(std::fs::metadata(&path)?.len() < large.len() as u64, "its full length means full content");
        }
        Ok(())
    }

    #[test]
    fn bytes_that_do_not_fit_a_shape_are_refused_before_there_is_a_file() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("file");
        let problem = write_file(&path, &[spec("a", Dtype::F32, 2)], &[&[0; 7]], &BTreeMap::new(), 1, &go_on);
        assert!(matches!(problem, Err(Error::Plan(text)) if text.contains("\"a\": 7 bytes, but its shape has 8")));
        assert!(!path.exists());
        Ok(())
    }

    #[test]
    fn a_file_that_ends_early_is_an_error_on_every_number_of_threads() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("file");
        std::fs::write(&path, [1, 2, 3])?;
        for threads in [1, 3] {
            let problem = read_into(&Input::open(&path)?, 1, &mut vec![0; 2 * PIECE_BYTES], threads);
            assert!(matches!(problem, Err(Error::Checkpoint(text)) if text.contains("ends before byte")));
        }
        Ok(())
    }
}
