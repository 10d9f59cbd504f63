//! Where the run-time directories of this user's VMs are.
//!
//! `$TARN_RUN_DIR`, `/run/tarn` (root), `$XDG_RUNTIME_DIR/tarn`, `/tmp/tarn-UID`; below it one directory for each VM, with
//! its sockets.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The directory above those of the VMs. Looks at nothing but the environment.
pub fn run_base() -> PathBuf {
    let uid = rustix::process::getuid().as_raw();
    base_for(|name| std::env::var_os(name).filter(|value| !value.is_empty()), uid)
}

fn base_for(env: impl Fn(&str) -> Option<OsString>, uid: u32) -> PathBuf {
    match (env("TARN_RUN_DIR"), uid, env("XDG_RUNTIME_DIR")) {
        (Some(dir), _, _) => dir.into(),
        (None, 0, _) => "/run/tarn".into(),
        (None, _, Some(dir)) => Path::new(&dir).join("tarn"),
        (None, _, None) => format!("/tmp/tarn-{uid}").into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_follows_the_environment() {
        let env = |set: &'static [(&str, &str)]| {
            move |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value))
        };
        let xdg = env(&[("XDG_RUNTIME_DIR", "/run/user/7")]);
        assert_eq!(base_for(xdg, 7), Path::new("/run/user/7/tarn"));
        assert_eq!(base_for(xdg, 0), Path::new("/run/tarn"));
        assert_eq!(base_for(env(&[]), 7), Path::new("/tmp/tarn-7"));
        assert_eq!(base_for(env(&[("TARN_RUN_DIR", "/x")]), 0), Path::new("/x"));
    }
}
