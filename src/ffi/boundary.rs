//! What stands between C and Rust: no panic passes it, and every failure leaves its words.

use std::{
    cell::RefCell,
    ffi::{CStr, CString, c_char},
    panic::{AssertUnwindSafe, catch_unwind},
};

use super::types::VmixStatus;
use crate::{Error, error::presentable};

/// Why a call failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub status: VmixStatus,
    pub message: String,
}

impl Failure {
    pub fn new(status: VmixStatus, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match error {
            Error::Io { .. } => VmixStatus::Io,
            Error::Safetensors { .. } | Error::Metadata { .. } | Error::Tensor { .. } => {
                VmixStatus::InvalidFile
            }
            Error::UnknownLabel { .. } | Error::UnknownLayer { .. } => VmixStatus::NotFound,
            Error::Argument { .. } => VmixStatus::InvalidArgument,
            Error::Unsupported { .. } => VmixStatus::Unsupported,
            Error::OutOfMemory { .. } => VmixStatus::OutOfMemory,
            Error::Candle(_) => VmixStatus::Internal,
        };
        Self::new(status, error.to_string())
    }
}

pub(super) type Result<T> = std::result::Result<T, Failure>;

/// Runs the body of an exported function.
pub(super) fn boundary(body: impl FnOnce() -> Result<()>) -> VmixStatus {
    // Bodies write their out-parameters last and take handles by shared reference, so that a panic
    // leaves nothing half done.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return VmixStatus::Ok,
        Ok(Err(failure)) => failure,
        Err(payload) => {
            let words = payload
                .downcast_ref::<&str>()
                .copied()
                .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
                .unwrap_or("no message");
            let message = format!("a bug in vmix: {words}");
            // A payload may panic again when it is dropped.
            std::mem::forget(payload);
            Failure::new(VmixStatus::Internal, message)
        }
    };
    // Messages list what is known, and files may hold any number of things.
    let message = c_string(&presentable(&failure.message, 4096));
    // Not there any more while the thread ends: then the status has to do.
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = message);
    failure.status
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// The message of this thread's last failure, until its next one.
pub(super) fn last_error() -> *const c_char {
    LAST_ERROR
        .try_with(|last| last.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

/// The text up to its first NUL.
pub(super) fn c_string(text: &str) -> CString {
    let text = text.split('\0').next().unwrap_or_default();
    CString::new(text).expect("the text ends before its first NUL")
}

/// Name of a status, by number: C may ask for any.
pub(super) fn status_name(status: u32) -> &'static CStr {
    const NAMES: [&CStr; 11] = [
        c"ok",
        c"null argument",
        c"invalid argument",
        c"not found",
        c"out of range",
        c"buffer size",
        c"input/output",
        c"invalid file",
        c"unsupported",
        c"out of memory",
        c"internal",
    ];
    usize::try_from(status)
        .ok()
        .and_then(|i| NAMES.get(i))
        .copied()
        .unwrap_or(c"unknown status")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> String {
        // SAFETY: no call has failed on this thread since.
        let words = unsafe { CStr::from_ptr(last_error()) };
        words.to_str().unwrap().to_owned()
    }

    #[test]
    fn panics_become_statuses() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("again");
            }
        }
        assert_eq!(boundary(|| panic!("oh {}", "no")), VmixStatus::Internal);
        assert_eq!(words(), "a bug in vmix: oh no");
        let bomb = || std::panic::panic_any(Bomb);
        assert_eq!(boundary(bomb), VmixStatus::Internal);
        assert_eq!(words(), "a bug in vmix: no message");
    }

    #[test]
    fn failures_leave_their_words_until_the_next() {
        let fail = |words: &str| Err(Failure::new(VmixStatus::NotFound, words));
        assert_eq!(boundary(|| fail("a\0b")), VmixStatus::NotFound);
        assert_eq!(boundary(|| Ok(())), VmixStatus::Ok);
        assert_eq!(words(), r"a\u{0}b");
    }

    #[test]
    fn messages_are_cut_between_characters() {
        for (count, expected) in [(5000, "ü".repeat(4096) + "…"), (4096, "ü".repeat(4096))] {
            let fail = || Err(Failure::new(VmixStatus::NotFound, "ü".repeat(count)));
            assert_eq!(boundary(fail), VmixStatus::NotFound);
            assert_eq!(words(), expected);
        }
    }

    #[test]
    fn every_status_has_a_name() {
        for status in 0..=VmixStatus::Internal as u32 {
            assert_ne!(status_name(status), c"unknown status");
        }
        assert_eq!(status_name(11), c"unknown status");
        assert_eq!(status_name(u32::MAX), c"unknown status");
    }
}
