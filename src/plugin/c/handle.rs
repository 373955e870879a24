//! Handles: numbers in the form of pointers, looked up and never followed, and never given twice. So what was freed is
//! told from what lives, whatever a program passes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use super::callback::HostCallback;
use super::status::Failure;
use crate::plugin::Steer;

/// What a handle stands for.
#[derive(Debug, Clone)]
pub(super) enum Object {
    Steer(Steer),
    Callback(Arc<Entry>),
}

/// A callback, with whether its handle still lives: a thread may remember one.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) callback: HostCallback,
    is_freed: AtomicBool,
}

static OBJECTS: LazyLock<RwLock<HashMap<usize, Object>>> = LazyLock::new(RwLock::default);

/// The number of the next handle; 0 is NULL.
static NEXT: AtomicUsize = AtomicUsize::new(1);

thread_local! {
    /// The callback that was looked up last: llama.cpp asks for one thousands of times in a row.
    static LAST: RefCell<Option<(usize, Arc<Entry>)>> = const { RefCell::new(None) };
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
    insert(Object::Callback(Arc::new(Entry { callback, is_freed: AtomicBool::new(false) })))
}

fn find(handle: *const c_void) -> Option<Object> {
    OBJECTS.read().unwrap_or_else(PoisonError::into_inner).get(&handle.addr()).cloned()
}

fn unknown(name: &str, handle: *const c_void) -> Failure {
    match handle.is_null() {
        true => Failure::argument(format!("{name}: expected a handle, found NULL")),
        false => Failure::handle(format!(
            "{name}: expected a handle that lives, found one that was freed or never was"
        )),
    }
}

fn other_kind(name: &str) -> Failure {
    Failure::handle(format!("{name}: expected a handle of its own kind, found one of another"))
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
        Some((number, entry)) if *number == handle.addr() && !entry.is_freed.load(Ordering::Acquire) => {
            Some(entry.clone())
        }
        _ => None,
    });
    if let Ok(Some(entry)) = remembered {
        return Ok(entry);
    }
    match find(handle) {
        Some(Object::Callback(entry)) => {
            let _ = LAST.try_with(|last| *last.borrow_mut() = Some((handle.addr(), entry.clone())));
            Ok(entry)
        }
        Some(Object::Steer(_)) => Err(other_kind("callback")),
        None => Err(unknown("callback", handle)),
    }
}

/// Removes what a handle stands for, if that is of the kind that `is_kind` knows.
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

pub(super) fn free_callback(handle: *const c_void) -> Result<(), Failure> {
    let removed = remove("callback", handle, |object| matches!(object, Object::Callback(_)))?;
    if let Some(Object::Callback(entry)) = removed {
        entry.is_freed.store(true, Ordering::Release);
        let _ = LAST.try_with(|last| {
            last.borrow_mut().take_if(|(number, _)| *number == handle.addr());
        });
    }
    Ok(())
}
