//! Signal handlers of the program, on POSIX systems.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{put, put_subject};
use crate::engine::{UsedFile, files_in_use};

/// Signals of a crash.
const SIGNALS: [c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGXCPU];

/// Rust's own handler of SIGSEGV, which recognises a stack overflow. Written once, before any handler is installed.
static mut RUST_HANDLER: MaybeUninit<libc::sigaction> = MaybeUninit::zeroed();

/// Whether the crash began with SIGSEGV, and Rust's handler was asked about it.
static ASKED_RUST: AtomicBool = AtomicBool::new(false);

/// Whether a thread is printing the message already.
static DYING: AtomicBool = AtomicBool::new(false);

pub(super) fn install() {
    // SAFETY: runs once, at the start of `main`, before other threads and before the handlers that read
    // RUST_HANDLER. Each `sigaction` is fully initialised: zeros are valid, and mean no flags and an empty mask.
    unsafe {
        libc::sigaction(libc::SIGSEGV, ptr::null(), (&raw mut RUST_HANDLER).cast());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        // On the alternate stack that Rust gives to each of its threads. A stack overflow leaves no other.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in SIGNALS {
            libc::sigaction(signal, &action, ptr::null_mut());
        }
        // A file beyond `ulimit -f` is then an error of `write`, which names the file.
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
    #[cfg(target_os = "linux")]
    exceptions::install();
}

extern "C" fn on_signal(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    if signal == libc::SIGSEGV && !ASKED_RUST.swap(true, Ordering::SeqCst) {
        ask_rust(signal, info, context);
    }
    // SAFETY: the system passes the signal's information and context, which are valid during the handler.
    let (address, stack) = unsafe { (address_of(info), stack_pointer(context)) };
    let is_overflow = match signal {
        // Rust's handler found an overflow, and aborted.
        libc::SIGABRT => ASKED_RUST.load(Ordering::SeqCst),
        // C++ code can step over the page that Rust watches.
        libc::SIGSEGV => stack.is_some_and(|stack| address.abs_diff(stack) < 1 << 20),
        _ => false,
    };
    die(&|| {
        match signal {
        libc::SIGBUS => put_bus_error(address),
        _ if is_overflow => put_end(
            b"the stack overflowed",
            b"raise the limit (ulimit -s), or shorten the longest text; nested or very long input needs most stack",
        ),
        _ => {
            let (_, reason, hint) = REASONS.iter().find(|(of, ..)| *of == signal).unwrap_or(&ABORTED);
            put_end(reason, hint);
        }
    }
    })
}

/// A signal, what happened, and what to do.
type Reason = (c_int, &'static [u8], &'static [u8]);

const REASONS: [Reason; 4] = [
    (
        libc::SIGSEGV,
        b"llama.cpp crashed (SIGSEGV, an invalid memory access)",
        b"the file may be damaged: compare its sha256 with the source. If they agree, try -np 1 and fewer flags",
    ),
    (
        libc::SIGILL,
        b"the program met an instruction that this CPU does not have (SIGILL)",
        b"use a build for this CPU",
    ),
    (
        libc::SIGXCPU,
        b"the limit of CPU time was reached (SIGXCPU)",
        b"raise it (ulimit -t), and run the same command again: eval, sweep and train resume",
    ),
    (
        libc::SIGFPE,
        b"llama.cpp divided by zero (SIGFPE)",
        b"a size in the file's metadata may be zero or wrong: download or convert the file again",
    ),
];

const ABORTED: Reason = (
    libc::SIGABRT,
    b"the program was aborted (SIGABRT)",
    b"the reason is in the lines above. If memory ran out: lower -np/--parallel, -c/--ctx-size or -k/--samples",
);

/// Passes SIGSEGV to Rust's handler. It prints and aborts after a stack overflow, and returns otherwise.
fn ask_rust(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: written before this handler was installed, and only read since.
    let action = unsafe { (&raw const RUST_HANDLER).cast::<libc::sigaction>().read() };
    let is_function = action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN;
    if is_function && action.sa_flags & libc::SA_SIGINFO != 0 {
        type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
        // SAFETY: with SA_SIGINFO the field holds a function of this type.
        let handler: Handler = unsafe { std::mem::transmute(action.sa_sigaction) };
        handler(signal, info, context);
    }
}

/// # Safety
/// `info` is null, or the information that the system passed to the running handler.
unsafe fn address_of(info: *mut libc::siginfo_t) -> usize {
    // SAFETY: by the contract above; for the signals handled here the field is an address or unused.
    unsafe { info.as_ref().map_or(0, |info| info.si_addr() as usize) }
}

/// The stack pointer at the time of the signal, where its place in the context is known.
///
/// # Safety
/// `context` is null, or the context that the system passed to the running handler.
unsafe fn stack_pointer(context: *mut c_void) -> Option<usize> {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    {
        // SAFETY: by the contract above, on this system it is a `ucontext_t`.
        let context = unsafe { context.cast::<libc::ucontext_t>().as_ref() }?;
        Some(context.uc_mcontext.gregs[libc::REG_RSP as usize] as usize)
    }
    #[cfg(all(target_os = "linux", target_arch = "aarch64"))]
    {
        // SAFETY: by the contract above, on this system it is a `ucontext_t`.
        let context = unsafe { context.cast::<libc::ucontext_t>().as_ref() }?;
        Some(context.uc_mcontext.sp as usize)
    }
    #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    {
        let _ = context;
        None
    }
}

/// `error: `, the files in use, `reason`, and a hint.
fn put_end(reason: &[u8], hint: &[u8]) {
    put_subject();
    put(reason);
    put(b"\nhint: ");
    put(hint);
    put(b"\n");
}

/// The message of SIGBUS, which a mapped file sends if it has become shorter or cannot be read.
fn put_bus_error(address: usize) {
    // The file that is mapped at the address, if that can be told; else each file that has become shorter.
    let mapped = mapped_file(address);
    let is_at_fault = |file: &UsedFile| {
        mapped.map_or_else(|| has_shrunk(file), |found| file.device_and_inode == Some(found))
    };
    if let Some(file) = files_in_use().find(|file| is_at_fault(file)) {
        put(b"error: ");
        put(file.text.as_bytes());
        if has_shrunk(file) {
            put(
                b" was truncated while it was read\nhint: restore the file, and run the same command again\n",
            );
        } else {
            put(b" could not be read (SIGBUS)\nhint: check the disk or network drive that holds it, and run the same command again\n");
        }
        return;
    }
    put_end(
        b"a mapped file or memory could not be read (SIGBUS)",
        b"a file was truncated while it was read, or a disk, a network drive or memory failed; check them, and run the same command again",
    );
}

fn has_shrunk(file: &UsedFile) -> bool {
    let mut found = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the path is terminated by NUL, and the buffer is a `stat`. `stat` may be called in signal handlers.
    let code = unsafe { libc::stat(file.c_path.as_ptr().cast(), found.as_mut_ptr()) };
    // SAFETY: filled by a successful call.
    code != 0 || (unsafe { found.assume_init() }.st_size as u64) < file.n_bytes
}

/// Device and inode of the file mapped at `address`, from `/proc/self/maps`.
#[cfg(target_os = "linux")]
fn mapped_file(address: usize) -> Option<(u64, u64)> {
    // SAFETY: the path is terminated by NUL. `open` may be called in signal handlers.
    let file = unsafe { libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if file < 0 {
        return None;
    }
    // Small: the alternate stack has a few KiB.
    let mut buffer = [0u8; 512];
    let mut line = MapLine::default();
    loop {
        // SAFETY: the buffer has the given length. `read` may be called in signal handlers.
        let n = unsafe { libc::read(file, buffer.as_mut_ptr().cast(), buffer.len()) };
        if n <= 0 {
            return None;
        }
        for &byte in &buffer[..n as usize] {
            if let Some(found) = line.take(byte, address as u64) {
                return found;
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn mapped_file(_: usize) -> Option<(u64, u64)> {
    None
}

/// A line of `/proc/self/maps`, read byte by byte: `start-end perms offset major:minor inode path`.
#[cfg(any(target_os = "linux", test))]
#[derive(Debug, Default)]
struct MapLine {
    /// Which number is being read: start, end, (permissions,) offset, major, minor, inode; 7 for the path.
    field: usize,
    numbers: [u64; 8],
}

#[cfg(any(target_os = "linux", test))]
impl MapLine {
    const PERMISSIONS: usize = 2;
    const INODE: usize = 6;
    const PATH: usize = 7;

    /// Takes the next byte. At the end of the inode of the line that covers `address`, returns its file, or
    /// `Some(None)` for memory without a file.
    fn take(&mut self, byte: u8, address: u64) -> Option<Option<(u64, u64)>> {
        let is_end = match byte {
            b'\n' => true,
            b' ' | b'-' | b':' if self.field < Self::PATH => {
                // The permissions contain dashes.
                if !(self.field == Self::PERMISSIONS && byte == b'-') {
                    self.field += 1;
                }
                self.field == Self::PATH
            }
            _ => {
                if self.field < Self::PATH && self.field != Self::PERMISSIONS {
                    let radix = if self.field == Self::INODE { 10 } else { 16 };
                    let digit = char::from(byte).to_digit(radix).unwrap_or(0);
                    let number = &mut self.numbers[self.field];
                    *number = number.wrapping_mul(u64::from(radix)).wrapping_add(u64::from(digit));
                }
                false
            }
        };
        let [start, end, _, _, major, minor, inode, _] = self.numbers;
        let found = (is_end && start <= address && address < end).then(|| {
            let device = libc::makedev(major as _, minor as _) as u64;
            (inode != 0).then_some((device, inode))
        });
        if byte == b'\n' {
            *self = MapLine::default();
        }
        found
    }
}

/// Writes to standard error.
pub(super) fn write_all(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the bytes are valid for their length. `write` may be called in signal handlers.
        let n = unsafe { libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len()) };
        match usize::try_from(n) {
            Ok(n) if n > 0 => bytes = &bytes[n..],
            _ => return,
        }
    }
}

pub(super) fn die(message: &dyn Fn()) -> ! {
    if DYING.swap(true, Ordering::SeqCst) {
        // Another thread prints its message and ends the process. If that one crashes again, end here.
        // SAFETY: `sleep` and `_exit` may be called in signal handlers.
        unsafe {
            libc::sleep(1);
            libc::_exit(1)
        }
    }
    // SAFETY: `isatty` only queries; on a terminal the message must not continue a progress bar's line.
    if unsafe { libc::isatty(libc::STDERR_FILENO) } == 1 {
        put(b"\n");
    }
    message();
    // SAFETY: `_exit` may be called in signal handlers. Destructors do not run, because memory may be corrupt.
    unsafe { libc::_exit(1) }
}

/// Uncaught C++ exceptions, which would otherwise abort the process with a backtrace.
#[cfg(target_os = "linux")]
mod exceptions {
    use std::ffi::{CStr, c_char, c_void};

    use super::{die, put, put_end, put_subject};

    unsafe extern "C" {
        /// `std::set_terminate`, under the name that every C++ compiler on Linux gives it.
        #[link_name = "_ZSt13set_terminatePFvvE"]
        fn set_terminate(handler: extern "C" fn()) -> *const c_void;
        /// The `std::type_info` of the exception in flight, or null.
        fn __cxa_current_exception_type() -> *const TypeInfo;
    }

    /// `std::type_info`, laid out as the Itanium C++ ABI defines it.
    #[repr(C)]
    struct TypeInfo {
        vtable: *const c_void,
        name: *const c_char,
    }

    pub(super) fn install() {
        // SAFETY: the handler is a function that never returns, as C++ requires of it.
        unsafe { set_terminate(on_terminate) };
    }

    extern "C" fn on_terminate() {
        // SAFETY: may be called at any time; a non-null result points to a static `type_info`.
        let name = unsafe { __cxa_current_exception_type().as_ref() }
            // SAFETY: the name of a `type_info` is a static string terminated by NUL.
            .map(|info| unsafe { CStr::from_ptr(info.name) }.to_bytes());
        die(&|| {
            match name {
            Some(b"St9bad_alloc" | b"St12length_error") => put_end(
                b"memory ran out in llama.cpp",
                b"lower -np/--parallel, -c/--ctx-size or -b/--batch-size, or raise the memory limit (ulimit -v)",
            ),
            name => {
                put_subject();
                put(b"llama.cpp stopped with an error that it does not handle (C++ exception ");
                put(name.unwrap_or(b"of an unknown type"));
                put(b")\nhint: try -np 1 and fewer flags, or another file of the model; -v shows llama.cpp's log\n");
            }
        }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_behind_an_address_is_found_in_the_maps() {
        let maps = "1000-2000 r--p 00000000 08:01 77   /lib/a-b c:d.so\n\
                    2000-3000 rw-p 00000000 00:00 0 \n\
                    3000-4000 r--s 00001000 fe:10 123456789 /x\n\
                    4000-5000 rw-p 00000000 00:00 0\n";
        let find = |address: u64| {
            let mut line = MapLine::default();
            maps.bytes().find_map(|byte| line.take(byte, address))
        };
        assert_eq!(find(0x1fff), Some(Some((libc::makedev(8, 1) as u64, 77))));
        assert_eq!(find(0x2000), Some(None));
        assert_eq!(find(0x3abc), Some(Some((libc::makedev(0xfe, 0x10) as u64, 123_456_789))));
        assert_eq!(find(0x4abc), Some(None));
        assert_eq!(find(0x9000), None);
    }
}
