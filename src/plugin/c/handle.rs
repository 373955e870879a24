//! Handles: numbers in the form of pointers, which are looked up and never dereferenced.
//!
//! A number is never used twice, so a freed handle is always recognised, whatever a program passes.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, PoisonError, RwLock, Weak};
use std::time::Duration;

use super::host_callback::HostCallback;
use super::status::Failure;
use crate::error::Error;
use crate::plugin::Steer;

/// The object behind a handle.
#[derive(Debug, Clone)]
pub(super) enum Object {
    Steer(Steer),
    Callback(Arc<Entry>),
}

/// A callback, and whether its handle was freed: a thread may still have it in its cache.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) callback: HostCallback,
    is_freed: AtomicBool,
    /// Number of threads that are running this eval callback.
    n_running: AtomicUsize,
}

/// Keeps a callback from being freed while a thread runs it.
pub(super) struct Running(Arc<Entry>);

impl Running {
    /// `None` if the callback was freed, or never existed.
    pub(super) fn enter(handle: *const c_void) -> Option<Running> {
        let entry = callback(handle).ok()?;
        // This increments `n_running` and then reads `is_freed`; `free_callback` sets `is_freed` and then reads
        // `n_running`. All four are sequentially consistent, so either this sees that the callback is freed, or
        // `free_callback` waits for this.
        entry.n_running.fetch_add(1, Ordering::SeqCst);
        N_RUNNING.with(|n| n.set(n.get() + 1));
        let running = Running(entry);
        (!running.0.is_freed.load(Ordering::SeqCst)).then_some(running)
    }

    pub(super) fn callback(&self) -> &HostCallback {
        &self.0.callback
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        N_RUNNING.with(|n| n.set(n.get() - 1));
        self.0.n_running.fetch_sub(1, Ordering::SeqCst);
    }
}

static OBJECTS: LazyLock<RwLock<HashMap<usize, Object>>> = LazyLock::new(RwLock::default);

/// The number of the next handle; 0 is NULL.
static NEXT: AtomicUsize = AtomicUsize::new(1);

thread_local! {
    /// Cache of the last lookup: llama.cpp calls the same callback thousands of times in a row.
    static LAST: RefCell<Option<(usize, Weak<Entry>)>> = const { RefCell::new(None) };
    /// Number of eval callbacks that this thread is in; they can be nested.
    static N_RUNNING: Cell<usize> = const { Cell::new(0) };
}

fn insert(object: Object) -> *mut c_void {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    OBJECTS.write().unwrap_or_else(PoisonError::into_inner).insert(number, object);
    std::ptr::without_provenance_mut(number)
}

pub(super) fn insert_steer(steer: Steer) -> *mut c_void {
    insert(Object::Steer(steer))
}

pub(super) fn insert_callback(callback: HostCallback) -> *mut c_void {
    let (is_freed, n_running) = (AtomicBool::new(false), AtomicUsize::new(0));
    insert(Object::Callback(Arc::new(Entry { callback, is_freed, n_running })))
}

fn find(handle: *const c_void) -> Option<Object> {
    OBJECTS.read().unwrap_or_else(PoisonError::into_inner).get(&handle.addr()).cloned()
}

fn unknown(name: &str, handle: *const c_void) -> Failure {
    match handle.is_null() {
        true => Failure::argument(format!("{name}: expected a handle, found NULL")),
        false => Failure::handle(format!(
            "{name}: expected a live handle, found one that was freed or never existed"
        )),
    }
}

fn other_kind(name: &str) -> Failure {
    Failure::handle(format!("{name}: expected a handle of this kind, found one of another kind"))
}

pub(super) fn steer(handle: *const c_void) -> Result<Steer, Failure> {
    match find(handle) {
        Some(Object::Steer(steer)) => Ok(steer),
        Some(Object::Callback(_)) => Err(other_kind("steer")),
        None => Err(unknown("steer", handle)),
    }
}

pub(super) fn callback(handle: *const c_void) -> Result<Arc<Entry>, Failure> {
    let remembered = LAST.try_with(|last| match &*last.borrow() {
        Some((number, entry)) if *number == handle.addr() => {
            entry.upgrade().filter(|entry| !entry.is_freed.load(Ordering::Acquire))
        }
        _ => None,
    });
    if let Ok(Some(entry)) = remembered {
        return Ok(entry);
    }
    match find(handle) {
        Some(Object::Callback(entry)) => {
            let _ = LAST.try_with(|last| *last.borrow_mut() = Some((handle.addr(), Arc::downgrade(&entry))));
            Ok(entry)
        }
        Some(Object::Steer(_)) => Err(other_kind("callback")),
        None => Err(unknown("callback", handle)),
    }
}

/// Removes the object of a handle, if `is_kind` holds for it. NULL is ignored.
fn remove(
    name: &str,
    handle: *const c_void,
    is_kind: fn(&Object) -> bool,
) -> Result<Option<Object>, Failure> {
    if handle.is_null() {
        return Ok(None);
    }
    let mut objects = OBJECTS.write().unwrap_or_else(PoisonError::into_inner);
    match objects.get(&handle.addr()) {
        Some(object) if is_kind(object) => Ok(objects.remove(&handle.addr())),
        Some(_) => Err(other_kind(name)),
        None => Err(unknown(name, handle)),
    }
}

pub(super) fn free_steer(handle: *const c_void) -> Result<(), Failure> {
    remove("steer", handle, |object| matches!(object, Object::Steer(_))).map(drop)
}

/// Frees a callback, and waits until no thread runs it.
///
/// After that the program's own callback is no longer called either.
pub(super) fn free_callback(handle: *const c_void) -> Result<(), Failure> {
    if N_RUNNING.with(Cell::get) > 0 {
        // This would deadlock: the thread would wait for itself, or for another thread that waits for it.
        return Err(Error::refused("callback", "it cannot be freed from within an eval callback")
            .with_hint("free it once llama_decode has returned")
            .into());
    }
    let removed = remove("callback", handle, |object| matches!(object, Object::Callback(_)))?;
    if let Some(Object::Callback(entry)) = removed {
        entry.is_freed.store(true, Ordering::SeqCst);
        while entry.n_running.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    Ok(())
}
