//! The stream: workers take tiles in the order of the output, make them and write them.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fastft_checkpoint::{Error, Output, Result};
use fastft_kernels::Cpu;
use fastft_kernels::finite::all_finite;

use crate::device::Device;
use crate::job::{Job, Kind, Made};
use crate::quantize::Quantize;
use crate::shared::SharedFactors;
use crate::tile::{self, Buffers, Reader};

/// What a run may use.
#[derive(Clone, Copy)]
pub struct Limits<'a> {
    /// Workers, at least 1.
    pub num_threads: usize,
    /// Bytes of all buffers together. The adapter factors of the tensors in work come on top.
    pub memory_budget_bytes: usize,
    /// Where merges are computed, if not on the CPU.
    pub device: Option<&'a dyn Device>,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of tensors written.
    pub done_bytes: u64,
    /// Bytes of tensors that will be written.
    pub total_bytes: u64,
}

/// What a run did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All files are written and on the disk.
    Done {
        /// Bytes read.
        bytes_read: u64,
        /// Bytes written, headers included.
        bytes_written: u64,
        /// Number of tensors.
        num_tensors: usize,
    },
    /// The caller stopped it; the files are incomplete.
    Stopped,
}

const NOT_FINITE: &str = "it holds values that are not finite (infinite or undefined), so the model would answer nonsense; \
    the weights in the source are broken";

/// How often the caller is asked whether to go on.
const TICK: Duration = Duration::from_millis(50);

/// A tile that stays in the caches between read, arithmetic and write; 8 MiB cost up to twice the time in the kernel.
const LARGEST_TILE_BYTES: usize = 1 << 20;
const SMALLEST_TILE_BYTES: usize = 64 << 10;
/// With a device each tile is one call into it.
const DEVICE_TILE_BYTES: usize = 8 << 20;

/// Runs `job`. `watch` is called in the calling thread some 20 times a second and once at the end; `Break` stops the run.
///
/// # Errors
/// A file cannot be read or written, an input changed, or a value cannot be represented; the output is incomplete.
///
/// # Panics
/// Only by a bug: a panic of a worker goes on in the caller.
pub fn run(
    job: &Job,
    cpu: Cpu,
    limits: Limits<'_>,
    watch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Outcome> {
    let Some(bytes_read) = flow(job, cpu, limits, false, watch)? else { return Ok(Outcome::Stopped) };
    let bytes_written = job.files.iter().map(|file| file.size_bytes).sum();
    Ok(Outcome::Done { bytes_read, bytes_written, num_tensors: job.tensors.len() })
}

/// Makes all tiles and writes them, or with `scan` only looks at what is quantized; the bytes read, or `None` when the
/// caller stopped it.
fn flow(
    job: &Job,
    cpu: Cpu,
    limits: Limits<'_>,
    scan: bool,
    watch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<u64>> {
    let num_threads = limits.num_threads.max(1);
    let tile_bytes = (limits.memory_budget_bytes / (4 * num_threads)).clamp(SMALLEST_TILE_BYTES, LARGEST_TILE_BYTES);
    let tile_bytes = if limits.device.is_some() { tile_bytes.max(DEVICE_TILE_BYTES) } else { tile_bytes };
    // A tile of a copy begins with a value.
    let tile_bytes = tile_bytes & !63;
    let stream = Stream::new(job, cpu, tile_bytes, scan, limits.device)?;
    let panicked = std::thread::scope(|scope| {
        let (alive, all_ended) = channel::<()>();
        let workers: Vec<_> = (0..num_threads)
            .map(|_| {
                let alive = alive.clone();
                let stream = &stream;
                scope.spawn(move || stream.work(&alive))
            })
            .collect();
        drop(alive);
        while all_ended.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            if watch(stream.progress()).is_break() {
                stream.stop();
            }
        }
        workers.into_iter().find_map(|worker| worker.join().err())
    });
    if let Some(payload) = panicked.or_else(|| lock(&stream.panic).take()) {
        resume_unwind(payload);
    }
    if let Some(error) = lock(&stream.failure).take() {
        return Err(error);
    }
    if stream.stopped.load(Ordering::Relaxed) || watch(stream.progress()).is_break() {
        return Ok(None);
    }
    for input in &job.inputs {
        input.check_unchanged()?;
    }
    Ok(Some(stream.bytes_read.into_inner()))
}

/// The scales of the one quantized tensor of `job`, without writing anything: their mean must be known before a file
/// can be laid out whose scales are quantized too. The rest is as for [`run`].
///
/// # Errors
/// As [`run`]; also when the job has not one quantized tensor. `None` when the caller stopped it.
///
/// # Panics
/// As [`run`].
pub fn scales(
    job: &Job,
    cpu: Cpu,
    limits: Limits<'_>,
    watch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Vec<f32>>> {
    let quantized: Vec<_> = job
        .tensors
        .iter()
        .filter_map(|made| if let Kind::Quantize(quantize) = &made.kind { Some(quantize) } else { None })
        .collect();
    let [quantize] = quantized[..] else {
        return Err(Error::Plan(format!(
            "block_maxima: one quantized tensor is needed; the plan has {}",
            quantized.len()
        )));
    };
    let done = flow(job, cpu, limits, true, watch)?;
    Ok(done.map(|_| quantize.take_scales()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Some rows of a tensor.
#[derive(Clone, Copy, Debug)]
struct Tile {
    tensor: usize,
    first_row: usize,
    num_rows: usize,
}

/// What the workers share.
struct Stream<'a> {
    job: &'a Job,
    cpu: Cpu,
    tiles: Vec<Tile>,
    next: AtomicUsize,
    /// Tiles of each tensor that are not done.
    left: Vec<AtomicUsize>,
    /// The open output files.
    outputs: Vec<Mutex<Option<Arc<Output>>>>,
    stopped: AtomicBool,
    failure: Mutex<Option<Error>>,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    shared: SharedFactors,
    bytes_read: AtomicU64,
    bytes_done: AtomicU64,
    /// Nothing is written; only the scales of what is quantized are found.
    scan: bool,
    /// Scales that end their file: written when all tiles are taken, since they wait for the rest of the file.
    deferred: Mutex<Vec<Deferred>>,
    device: Option<&'a dyn Device>,
}

/// Bytes that are still to be written.
struct Deferred {
    file: usize,
    offset: u64,
    bytes: Vec<u8>,
}

impl<'a> Stream<'a> {
    fn new(job: &'a Job, cpu: Cpu, tile_bytes: usize, scan: bool, device: Option<&'a dyn Device>) -> Result<Self> {
        let mut tiles = Vec::new();
        let mut left = Vec::with_capacity(job.tensors.len());
        for (tensor, made) in job.tensors.iter().enumerate() {
            let too_large = |_| Error::Plan(format!("tensor {:?}: too large for this machine", made.name));
            let num_rows = usize::try_from(made.num_rows).map_err(too_large)?;
            let row_bytes = usize::try_from(made.row_bytes).map_err(too_large)?;
            let before = tiles.len();
            let granule = match &made.kind {
                Kind::Companion => 0,
                Kind::Quantize(quantize) => quantize.granule(num_rows),
                _ if scan => 0,
                _ => 1,
            };
            if let Some(most_rows) = tile_bytes.checked_div(row_bytes)
                && granule > 0
            {
                let most_rows = (most_rows / granule).max(1) * granule;
                let starts = (0..num_rows).step_by(most_rows);
                tiles.extend(starts.map(|first_row| Tile {
                    tensor,
                    first_row,
                    num_rows: most_rows.min(num_rows - first_row),
                }));
            }
            left.push(AtomicUsize::new(tiles.len() - before));
        }
        Ok(Self {
            job,
            cpu,
            tiles,
            next: AtomicUsize::new(0),
            left,
            outputs: job.files.iter().map(|_| Mutex::new(None)).collect(),
            stopped: AtomicBool::new(false),
            failure: Mutex::new(None),
            panic: Mutex::new(None),
            shared: SharedFactors::default(),
            bytes_read: AtomicU64::new(0),
            bytes_done: AtomicU64::new(0),
            scan,
            deferred: Mutex::default(),
            device,
        })
    }

    fn progress(&self) -> Progress {
        Progress { done_bytes: self.bytes_done.load(Ordering::Relaxed), total_bytes: self.job.total_bytes }
    }

    /// Ends all workers soon, also one that waits to write the last piece of a file.
    fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        for output in &self.outputs {
            if let Some(output) = lock(output).as_ref() {
                output.give_up();
            }
        }
    }

    /// A worker's life; `_alive` tells the caller when it ends.
    fn work(&self, _alive: &Sender<()>) {
        match catch_unwind(AssertUnwindSafe(|| self.make_tiles())) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                // The first failure is the cause, later ones may only follow from it; and none counts after a stop.
                if !self.stopped.load(Ordering::SeqCst) {
                    lock(&self.failure).get_or_insert(error);
                }
                self.stop();
            }
            Err(payload) => {
                lock(&self.panic).get_or_insert(payload);
                self.stop();
            }
        }
    }

    fn make_tiles(&self) -> Result<()> {
        let mut buffers = Buffers::default();
        if !self.scan {
            self.write_empty_files()?;
        }
        while !self.stopped.load(Ordering::SeqCst) {
            let Some(tile) = self.tiles.get(self.next.fetch_add(1, Ordering::Relaxed)) else { break };
            self.make_tile(*tile, &mut buffers)?;
        }
        loop {
            let Some(deferred) = lock(&self.deferred).pop() else { return Ok(()) };
            self.write(deferred.file, &deferred.bytes, deferred.offset)?;
        }
    }

    /// Files without data have no tile that would write them.
    fn write_empty_files(&self) -> Result<()> {
        for (index, file) in self.job.files.iter().enumerate() {
            if file.size_bytes == file.head.len() as u64 {
                let mut output = lock(&self.outputs[index]);
                if output.is_none() {
                    *output = Some(self.create(index)?);
                }
            }
        }
        Ok(())
    }

    fn make_tile(&self, tile: Tile, buffers: &mut Buffers) -> Result<()> {
        let made = &self.job.tensors[tile.tensor];
        let (start, nbytes) = match &made.kind {
            Kind::Quantize(quantize) => quantize.range(tile.first_row, tile.num_rows),
            _ => (tile.first_row as u64 * made.row_bytes, tile.num_rows as u64 * made.row_bytes),
        };
        let offset = made.offset + start;
        let copied = match &made.kind {
            Kind::Copy { place } if made.must_be_finite.is_none() => {
                self.copy(made, place.input, place.offset + tile.first_row as u64, nbytes, offset)?
            }
            _ => None,
        };
        match copied {
            Some(true) => self.close(made.file)?,
            Some(false) => {}
            None => self.compute(made, tile, offset, buffers)?,
        }
        self.bytes_done.fetch_add(nbytes, Ordering::Relaxed);
        Ok(())
    }

    /// Flushes a file that is whole.
    fn close(&self, file: usize) -> Result<()> {
        self.output(file)?.sync()?;
        lock(&self.outputs[file]).take();
        Ok(())
    }

    fn write(&self, file: usize, bytes: &[u8], offset: u64) -> Result<()> {
        if self.output(file)?.write_at(bytes, offset)? {
            self.close(file)?;
        }
        Ok(())
    }

    /// Has the system copy a range; `None` where it cannot.
    fn copy(&self, made: &Made, input: usize, start: u64, nbytes: u64, offset: u64) -> Result<Option<bool>> {
        let input = &self.job.inputs[input];
        let copied = self.output(made.file)?.copy_at(input, start, nbytes, offset);
        let copied = copied.map_err(|error| tile::named(&made.name, error))?;
        if copied.is_some() {
            input.forget(start, nbytes);
            self.bytes_read.fetch_add(nbytes, Ordering::Relaxed);
        }
        Ok(copied)
    }

    /// Reads, computes and writes a tile, and with the last one of a quantized tensor its scales.
    fn compute(&self, made: &Made, tile: Tile, offset: u64, buffers: &mut Buffers) -> Result<()> {
        let reader = Reader {
            tensor: &made.name,
            cpu: self.cpu,
            inputs: &self.job.inputs,
            shared: &self.shared,
            bytes_read: &self.bytes_read,
            forget: !self.scan,
            device: self.device,
            stopped: &self.stopped,
        };
        if self.scan {
            if let Kind::Quantize(quantize) = &made.kind {
                quantize.scan(&reader, tile.first_row, tile.num_rows, buffers)?;
                if self.left[tile.tensor].fetch_sub(1, Ordering::AcqRel) == 1 {
                    tile::finish(&made.kind, &made.name, self.device);
                }
            }
            return Ok(());
        }
        tile::make(made, &reader, tile.first_row, tile.num_rows, buffers)?;
        if let Some(element) = made.must_be_finite
            && !all_finite(element, &buffers.output)
        {
            return Err(reader.refuse(NOT_FINITE));
        }
        if self.left[tile.tensor].fetch_sub(1, Ordering::AcqRel) == 1 {
            tile::finish(&made.kind, &made.name, self.device);
            if let Kind::Quantize(quantize) = &made.kind {
                // Before the tile itself, which may end the file and then waits for the rest of it.
                self.write_scales(quantize, &reader)?;
            }
        }
        self.write(made.file, &buffers.output, offset)
    }

    fn write_scales(&self, quantize: &Quantize, reader: &Reader) -> Result<()> {
        let (absmax, nested) = quantize.companion_bytes(reader)?;
        let (mut absmax, mut nested) = (Some(absmax), Some(nested));
        for companion in &quantize.companions {
            let bytes = if companion.nested { nested.take() } else { absmax.take() }.unwrap_or_default();
            self.bytes_done.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            if companion.offset + bytes.len() as u64 == self.job.files[companion.file].size_bytes {
                lock(&self.deferred).push(Deferred { file: companion.file, offset: companion.offset, bytes });
            } else {
                self.write(companion.file, &bytes, companion.offset)?;
            }
        }
        Ok(())
    }

    fn output(&self, file: usize) -> Result<Arc<Output>> {
        let mut output = lock(&self.outputs[file]);
        if let Some(output) = output.as_ref() {
            return Ok(Arc::clone(output));
        }
        let created = self.create(file)?;
        *output = Some(Arc::clone(&created));
        drop(output);
        if self.stopped.load(Ordering::SeqCst) {
            created.give_up(); // `stop` may have passed before the file was there
        }
        Ok(created)
    }

    /// Creates a file and writes its header.
    fn create(&self, file: usize) -> Result<Arc<Output>> {
        let file = &self.job.files[file];
        let output = Output::create(&file.path, file.size_bytes)?;
        if output.write_at(&file.head, 0)? {
            output.sync()?;
        }
        Ok(Arc::new(output))
    }
}
