//! What people do with a guest, made of single commands.

mod copy;
mod exec;

pub use copy::{CopyError, copy_from_guest, copy_to_guest};
pub use exec::{ExecError, ExecRequest, ExecStatus, Output, Stream, exec};
