//! A GPU and its memory, owned; and statuses as errors.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{Error, Result};

use crate::train::device::cuda::ffi;

/// An open GPU.
#[derive(Debug)]
pub struct Handle {
    raw: NonNull<ffi::detox_cuda_device>,
    ordinal: usize,
}

// SAFETY: the extension takes calls from any thread; a lock of its own gives each its turn.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// What the driver tells of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// As the driver calls it.
    pub name: String,
    /// Major and minor.
    pub compute_capability: (i32, i32),
    /// CUDA's version of the driver, as 1000 major + 10 minor.
    pub driver_version: i32,
}

impl Handle {
    /// Opens GPU `ordinal`.
    pub fn open(ordinal: usize) -> Result<Arc<Handle>> {
        let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let mut raw = std::ptr::null_mut();
        // SAFETY: takes any number, and writes one pointer to where `raw` is.
        check(ordinal, unsafe { ffi::detox_cuda_open(number, &mut raw) })?;
        let raw = NonNull::new(raw).expect("an open that succeeds gives a device");
        Ok(Arc::new(Handle { raw, ordinal }))
    }

    /// For calls of the extension; valid as long as `self`.
    pub fn raw(&self) -> *mut ffi::detox_cuda_device {
        self.raw.as_ptr()
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The error of a status that is none of success; right after the call, on its thread.
    pub fn check(&self, status: ffi::detox_cuda_status) -> Result<()> {
        check(self.ordinal, status)
    }

    /// What the driver tells of it.
    pub fn properties(&self) -> Result<Properties> {
        // SAFETY: plain numbers and bytes, for which zeros are valid.
        let mut found: ffi::detox_cuda_properties = unsafe { std::mem::zeroed() };
        // SAFETY: the device is open; writes one struct to where `found` is.
        self.check(unsafe { ffi::detox_cuda_describe(self.raw(), &mut found) })?;
        let bytes = found.name.map(|c| c as u8);
        let name = CStr::from_bytes_until_nul(&bytes).map(|name| name.to_string_lossy().into_owned());
        Ok(Properties {
            name: name.unwrap_or_else(|_| "a GPU".into()),
            compute_capability: (found.major, found.minor),
            driver_version: found.driver_version,
        })
    }

    /// Bytes that could still be had, and bytes in all.
    pub fn memory_bytes(&self) -> Result<(u64, u64)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the device is open; writes two numbers.
        self.check(unsafe { ffi::detox_cuda_memory(self.raw(), &mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: opened once and closed once; memory and rows hold an `Arc` of it, so they are gone.
        unsafe { ffi::detox_cuda_close(self.raw()) }
    }
}

/// GPUs that there are.
pub fn count() -> Result<usize> {
    let mut n = 0;
    // SAFETY: writes one number to where `n` is.
    check(0, unsafe { ffi::detox_cuda_count(&mut n) })?;
    Ok(usize::try_from(n).unwrap_or(0))
}

/// Whether a program can use a GPU on this machine. Where the runtime fails, a machine without NVIDIA's device node is taken
/// to have none; on one with it that is a fault of the driver.
///
/// # Errors
/// As [`count`].
pub fn is_present() -> Result<bool> {
    presence(count(), || std::path::Path::new("/dev/nvidiactl").exists())
}

fn presence(count: Result<usize>, has_node: impl FnOnce() -> bool) -> Result<bool> {
    match count {
        Ok(n) => Ok(n > 0),
        Err(_) if !has_node() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Words for a status of a call on GPU `ordinal`, with the cure where there is one.
fn check(ordinal: usize, status: ffi::detox_cuda_status) -> Result<()> {
    if status == ffi::DETOX_CUDA_OK {
        return Ok(());
    }
    // SAFETY: a string that ends with 0, and stays until this thread's next call.
    let reason = unsafe { CStr::from_ptr(ffi::detox_cuda_last_error()) }.to_string_lossy().into_owned();
    let device = format!("cuda:{ordinal}");
    if status == ffi::DETOX_CUDA_OUT_OF_MEMORY {
        let hint = "free the card's memory (nvidia-smi names the processes that hold it), or train with \
                    --frozen quantised, --checkpointing on, or a smaller --ubatch-size or --rank";
        return Err(Error::device_memory(device, reason).with_hint(hint));
    }
    let hint = match status {
        ffi::DETOX_CUDA_NO_DEVICE => Some(
            "nvidia-smi lists the GPUs there are, CUDA_VISIBLE_DEVICES hides some; or train with --device cpu",
        ),
        ffi::DETOX_CUDA_DRIVER => Some(
            "install a newer NVIDIA driver (nvidia-smi names the CUDA version it is good for), or train with --device cpu",
        ),
        ffi::DETOX_CUDA_UNSUPPORTED => Some("train with --device cpu"),
        ffi::DETOX_CUDA_BUILD => Some(
            "build for this GPU with DETOX_CUDA_ARCH (compute capability without its point, such as 89), or train with \
             --device cpu",
        ),
        _ => None,
    };
    Err(Error::Device { device, reason, hint: hint.map(str::to_owned) })
}

/// That an operation of `wanted` was given what belongs to it: to another handle belongs another GPU's memory, or memory
/// on which this GPU works in an order of its own.
#[track_caller]
fn assert_same(found: &Arc<Handle>, wanted: &Arc<Handle>) {
    assert!(
        Arc::ptr_eq(found, wanted),
        "an operation on cuda:{} was given what another handle, on cuda:{}, holds",
        wanted.ordinal,
        found.ordinal
    );
}

/// Bytes on a GPU.
#[derive(Debug)]
pub struct Memory {
    handle: Arc<Handle>,
    at: NonNull<c_void>,
    n_bytes: usize,
}

// SAFETY: an address on the GPU, which this program never reads through; the calls that do take turns.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `n_bytes` bytes, whatever they are.
    pub fn new(handle: &Arc<Handle>, n_bytes: usize) -> Result<Memory> {
        let mut at = std::ptr::null_mut();
        // SAFETY: the device is open; writes one pointer.
        handle.check(unsafe { ffi::detox_cuda_allocate(handle.raw(), n_bytes, &mut at) })?;
        let at = NonNull::new(at).expect("memory that was given has an address");
        Ok(Memory { handle: handle.clone(), at, n_bytes })
    }

    /// A copy of `bytes`.
    pub fn of(handle: &Arc<Handle>, bytes: &[u8]) -> Result<Memory> {
        let memory = Memory::new(handle, bytes.len())?;
        memory.write_bytes(bytes)?;
        Ok(memory)
    }

    /// That it belongs to `handle`.
    #[track_caller]
    pub fn assert_of(&self, handle: &Arc<Handle>) {
        assert_same(&self.handle, handle);
    }

    /// Its address on the GPU.
    pub fn address(&self) -> *mut c_void {
        self.at.as_ptr()
    }

    /// Overwrites it by as many bytes.
    pub fn write_bytes(&self, bytes: &[u8]) -> Result<()> {
        assert_eq!(bytes.len(), self.n_bytes, "bytes for memory of another size");
        // SAFETY: both sides have `n_bytes` bytes, and the host's stay during the call.
        let status = unsafe {
            ffi::detox_cuda_write(self.handle.raw(), bytes.as_ptr().cast(), self.n_bytes, self.address())
        };
        self.handle.check(status)
    }

    /// Makes every byte 0.
    pub fn clear(&self) -> Result<()> {
        // SAFETY: the memory has `n_bytes` bytes.
        self.handle.check(unsafe { ffi::detox_cuda_clear(self.handle.raw(), self.n_bytes, self.address()) })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: taken once and given back once; what still works on it was asked for before, and comes first.
        let status = unsafe { ffi::detox_cuda_release(self.handle.raw(), self.address()) };
        if let Err(error) = self.handle.check(status) {
            tracing::warn!("{error}");
        }
    }
}

/// f32 numbers on a GPU.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    len: usize,
}

impl Buffer {
    /// `len` numbers, whatever they are.
    pub fn new(handle: &Arc<Handle>, len: usize) -> Result<Buffer> {
        let n_bytes = len.checked_mul(size_of::<f32>()).expect("a buffer that fits into an address space");
        Ok(Buffer { memory: Memory::new(handle, n_bytes)?, len })
    }

    /// Numbers.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Makes every number 0.
    pub fn clear(&mut self) -> Result<()> {
        self.memory.clear()
    }

    /// Overwrites it by as many numbers.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), self.len, "numbers for a buffer of another length");
        let n_bytes = size_of_val(values);
        // SAFETY: f32 has neither padding nor invalid bytes.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), n_bytes) };
        self.memory.write_bytes(bytes)
    }

    /// All numbers.
    pub fn read(&self) -> Result<Vec<f32>> {
        let mut values = vec![0.0f32; self.len];
        let (handle, n_bytes) = (&self.memory.handle, self.memory.n_bytes);
        // SAFETY: both sides have `n_bytes` bytes, and any bytes are f32 numbers.
        let status = unsafe {
            ffi::detox_cuda_read(handle.raw(), self.memory.address(), n_bytes, values.as_mut_ptr().cast())
        };
        handle.check(status)?;
        Ok(values)
    }

    /// That it belongs to `handle`.
    #[track_caller]
    pub(super) fn assert_of(&self, handle: &Arc<Handle>) {
        self.memory.assert_of(handle);
    }

    /// Its address on the GPU, to read.
    pub fn at(&self) -> *const f32 {
        self.memory.address().cast_const().cast()
    }

    /// Its address on the GPU, to write.
    pub fn at_mut(&mut self) -> *mut f32 {
        self.memory.address().cast()
    }
}

/// A batch on a GPU.
#[derive(Debug)]
pub struct Rows {
    // Before the handle, which it needs to be closed.
    raw: NonNull<ffi::detox_cuda_rows>,
    handle: Arc<Handle>,
    /// Rows.
    pub n_rows: usize,
    /// Outputs.
    pub n_outputs: usize,
    /// Pairs.
    pub n_pairs: usize,
    /// The largest token that is read.
    pub most_token: usize,
    /// The largest token that is predicted.
    pub most_output: usize,
    /// The largest position.
    pub most_position: usize,
}

// SAFETY: made once, never changed, and read by the GPU alone.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// Takes `packed` to the GPU.
    pub fn new(handle: &Arc<Handle>, packed: &crate::train::data::pack::Packed) -> Result<Rows> {
        let number = |n: usize| i32::try_from(n).expect("a batch of fewer rows than 2^31");
        let positions: Vec<i32> = packed.positions.iter().map(|&p| number(p)).collect();
        let segment = |segment: &crate::train::data::pack::Segment| ffi::detox_cuda_segment {
            first: number(segment.rows.start),
            end: number(segment.rows.end),
            prefix_first: number(segment.prefix.start),
            prefix_end: number(segment.prefix.end),
        };
        let segments: Vec<_> = packed.segments.iter().map(segment).collect();
        let output_rows: Vec<i32> = packed.outputs.iter().map(|o| number(o.row)).collect();
        let output_tokens: Vec<i32> = packed.outputs.iter().map(|o| o.token).collect();
        let answer_ends: Vec<i32> = packed.answers.iter().map(|answer| number(answer.end)).collect();
        let follow = packed.answers.windows(2).all(|two| two[0].end == two[1].start);
        assert!(follow && packed.answers.len().is_multiple_of(2), "pairs of answers one after the other");
        assert_eq!(positions.len(), packed.tokens.len(), "a position for each token");
        let batch = ffi::detox_cuda_batch {
            n_rows: packed.tokens.len() as i64,
            n_segments: segments.len() as i64,
            n_outputs: output_rows.len() as i64,
            n_answers: answer_ends.len() as i64,
            tokens: packed.tokens.as_ptr(),
            positions: positions.as_ptr(),
            segments: segments.as_ptr(),
            output_rows: output_rows.as_ptr(),
            output_tokens: output_tokens.as_ptr(),
            answer_ends: answer_ends.as_ptr(),
        };
        let mut raw = std::ptr::null_mut();
        // SAFETY: each array has as many numbers as the batch says, and stays during the call; writes one pointer.
        handle.check(unsafe { ffi::detox_cuda_rows_open(handle.raw(), &batch, &mut raw) })?;
        let most = |tokens: &[i32]| tokens.iter().copied().max().unwrap_or(0) as usize;
        Ok(Rows {
            raw: NonNull::new(raw).expect("rows that were taken have an address"),
            handle: handle.clone(),
            n_rows: packed.tokens.len(),
            n_outputs: output_rows.len(),
            n_pairs: answer_ends.len() / 2,
            most_token: most(&packed.tokens),
            most_output: most(&output_tokens),
            most_position: packed.positions.iter().copied().max().unwrap_or(0),
        })
    }

    /// That they belong to `handle`.
    #[track_caller]
    pub(super) fn assert_of(&self, handle: &Arc<Handle>) {
        assert_same(&self.handle, handle);
    }

    /// For calls of the extension.
    pub fn raw(&self) -> *const ffi::detox_cuda_rows {
        self.raw.as_ptr()
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        // SAFETY: opened once and closed once, while the device is open.
        unsafe { ffi::detox_cuda_rows_close(self.raw.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_fails_is_no_machine_without_gpus() {
        let failed = || Err(Error::device("cuda:0", "broken"));
        assert_eq!(presence(failed(), || true).unwrap_err().to_string(), "cuda:0: broken");
        assert!(!presence(failed(), || false).unwrap());
        assert!(!presence(Ok(0), || true).unwrap());
        assert!(presence(Ok(2), || true).unwrap());
    }
}
