//! Buffers of f32 in reused memory.
//!
//! A step allocates and drops about a thousand buffers of a few sizes. With the system's allocator, some of that memory
//! would end up in gaps that fit no other buffer, and some would go back to the kernel, which clears every page before
//! it hands it out again. So the memory of a dropped buffer is kept for the next buffer of about the same size. Kept
//! and used memory together never exceed the peak of used memory; the rest is freed at once.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;

use crate::error::{Error, Result};

/// Smaller buffers are not kept, since the allocator handles them well.
const LEAST: usize = 1 << 15;

/// f32 numbers.
#[derive(Debug)]
pub struct Buffer {
    values: Values,
    /// Numbers of `values` in use; the rest is spare room.
    len: usize,
    memory: Memory,
}

#[derive(Debug)]
enum Values {
    Few(Vec<f32>),
    Many(Pages),
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.values {
            Values::Few(values) => values,
            Values::Many(pages) => &pages.as_slice()[..self.len],
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.values {
            Values::Few(values) => values,
            Values::Many(pages) => &mut pages.as_mut_slice()[..self.len],
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Values::Many(pages) = std::mem::replace(&mut self.values, Values::Few(Vec::new())) {
            self.memory.lock().leave(pages);
        }
    }
}

/// Numbers in their own pages, zero when new.
#[derive(Debug)]
struct Pages(MmapMut);

impl Pages {
    fn new(n: usize) -> Result<Pages> {
        let refuse = |error: std::io::Error| {
            Error::device_memory("cpu", format!("cannot allocate {} MiB: {error}", (4 * n) >> 20))
                .with_hint("lower --ubatch-size, or set --checkpointing on")
        };
        let map = MmapMut::map_anon(4 * n).map_err(refuse)?;
        // Large pages save page faults and address translations. Without them nothing is lost.
        #[cfg(target_os = "linux")]
        map.advise(memmap2::Advice::HugePage).ok();
        Ok(Pages(map))
    }

    fn len(&self) -> usize {
        self.0.len() / 4
    }

    fn as_slice(&self) -> &[f32] {
        // SAFETY: pages are aligned and initialised, and every bit pattern is a valid f32.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.len()) }
    }

    fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.len()) }
    }
}

/// The content of a new buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fresh {
    /// Zeros.
    Zeros,
    /// Whatever its last owner left.
    Used,
}

/// Allocates buffers, and keeps the memory of dropped ones.
#[derive(Debug, Clone, Default)]
pub struct Memory(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    /// Kept memory, most recently dropped last.
    free: Vec<Pages>,
    /// Numbers in `free`.
    n_free: usize,
    /// Numbers in use.
    n_used: usize,
    /// Peak of `n_used`.
    most_used: usize,
}

impl Memory {
    /// Allocates a buffer of `n` numbers, and says what it contains.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] if the system has no memory left.
    pub fn take(&self, n: usize) -> Result<(Buffer, Fresh)> {
        let (values, fresh) = match n < LEAST {
            true => (Values::Few(vec![0.0; n]), Fresh::Zeros),
            false => {
                let (pages, fresh) = self.lock().take(n)?;
                (Values::Many(pages), fresh)
            }
        };
        Ok((Buffer { values, len: n, memory: self.clone() }, fresh))
    }

    /// Frees the kept memory.
    pub fn trim(&self) {
        self.lock().trim();
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // No panic can leave the counts half-updated.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Pages for `n` numbers or slightly more.
    fn take(&mut self, n: usize) -> Result<(Pages, Fresh)> {
        // The smallest pages that fit; of equal ones the most recently dropped, which may still be in a cache.
        let fits = self.free.iter().enumerate().filter(|(_, pages)| (n..=n + n / 4).contains(&pages.len()));
        let best = fits.min_by_key(|(i, pages)| (pages.len(), usize::MAX - i)).map(|(i, _)| i);
        if let Some(best) = best {
            let pages = self.free.remove(best);
            self.n_free -= pages.len();
            self.use_more(pages.len());
            return Ok((pages, Fresh::Used));
        }
        // Up to an eighth more, so that batches of similar size can share pages.
        let room = n.next_multiple_of(1 << n.ilog2().saturating_sub(3));
        let most_before = self.most_used;
        self.use_more(room);
        let mut n_over = (self.n_used + self.n_free).saturating_sub(self.most_used);
        let is_over = |pages: &Pages| {
            let is_over = n_over > 0;
            n_over = n_over.saturating_sub(pages.len());
            is_over
        };
        let n_dropped = self.free.iter().map(is_over).take_while(|&is_over| is_over).count();
        self.n_free -= self.free.drain(..n_dropped).map(|pages| pages.len()).sum::<usize>();
        // If the system has no memory left, free the kept memory and try again.
        let pages = Pages::new(room).or_else(|_| {
            self.trim();
            Pages::new(room)
        });
        match pages {
            Ok(pages) => Ok((pages, Fresh::Zeros)),
            Err(error) => {
                self.n_used -= room;
                self.most_used = most_before;
                Err(error)
            }
        }
    }

    fn trim(&mut self) {
        self.free.clear();
        self.n_free = 0;
    }

    fn use_more(&mut self, n: usize) {
        self.n_used += n;
        self.most_used = self.most_used.max(self.n_used);
    }

    fn leave(&mut self, pages: Pages) {
        self.n_used -= pages.len();
        self.n_free += pages.len();
        self.free.push(pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(memory: &Memory) -> [usize; 3] {
        let kept = memory.lock();
        assert_eq!(kept.free.iter().map(Pages::len).sum::<usize>(), kept.n_free);
        [kept.n_used, kept.n_free, kept.most_used]
    }

    #[test]
    fn a_buffer_of_similar_size_reuses_dropped_memory() {
        let memory = Memory::default();
        let (mut first, fresh) = memory.take(100_000).unwrap();
        assert_eq!((first.len(), fresh), (100_000, Fresh::Zeros));
        assert!(first.iter().all(|&x| x == 0.0));
        first.fill(7.0);
        let place = first.as_ptr();
        drop(first);
        let (more, fresh) = memory.take(102_000).unwrap();
        assert_eq!((more.len(), fresh, more.as_ptr() == place), (102_000, Fresh::Used, true));
        assert_eq!(more[..100_000], [7.0; 100_000]);
        drop(more);
        // A buffer half as long does not: it would waste the rest.
        let (half, fresh) = memory.take(50_000).unwrap();
        assert_eq!((half.len(), fresh), (50_000, Fresh::Zeros));
    }

    #[test]
    fn kept_and_used_memory_never_exceed_the_peak_of_used_memory() {
        let memory = Memory::default();
        let large: Vec<Buffer> = (0..4).map(|_| memory.take(1 << 17).unwrap().0).collect();
        assert_eq!(counts(&memory), [4 << 17, 0, 4 << 17]);
        drop(large);
        assert_eq!(counts(&memory), [0, 4 << 17, 4 << 17]);
        // None of the kept pages fits: the oldest are freed.
        let small: Vec<Buffer> = (0..4).map(|_| memory.take(1 << 15).unwrap().0).collect();
        assert_eq!(counts(&memory), [4 << 15, 3 << 17, 4 << 17]);
        let larger = memory.take(1 << 19).unwrap();
        assert_eq!(counts(&memory), [(1 << 19) + (4 << 15), 0, (1 << 19) + (4 << 15)]);
        drop((small, larger));
        assert_eq!(counts(&memory)[..2], [0, (1 << 19) + (4 << 15)]);
    }

    #[test]
    fn small_buffers_are_not_kept() {
        let memory = Memory::default();
        drop(memory.take(LEAST - 1).unwrap());
        drop(memory.take(0).unwrap());
        assert_eq!(counts(&memory), [0; 3]);
    }

    #[test]
    fn running_out_of_memory_is_an_error_that_leaks_nothing() {
        let memory = Memory::default();
        let kept = memory.take(1 << 17).unwrap();
        let error = memory.take(1 << 60).unwrap_err();
        assert!(error.to_string().starts_with("cpu: cannot allocate 4398046511104 MiB"), "{error}");
        drop(kept);
        assert_eq!(counts(&memory), [0, 1 << 17, 1 << 17]);
        // The failed attempt has freed the kept memory.
        memory.take(1 << 60).unwrap_err();
        assert_eq!(counts(&memory), [0, 0, 1 << 17]);
    }

    #[test]
    fn trim_frees_the_kept_memory() {
        let memory = Memory::default();
        let used = memory.take(1 << 16).unwrap();
        drop(memory.take(1 << 17).unwrap());
        memory.trim();
        assert_eq!(counts(&memory), [1 << 16, 0, (1 << 16) + (1 << 17)]);
        drop(used);
    }
}
