//! Facts about the guest: guest-get-osinfo, guest-get-host-name, guest-get-time.

use std::time::{SystemTime, UNIX_EPOCH};

use protocol::{Args, Error, Map};
use serde_json::{Value, json};

use super::os_release;
use crate::dispatch::Guest;

pub(crate) fn get_host_name(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy();
    let name = if name.is_empty() { "localhost".into() } else { name };
    Ok(json!({"host-name": name}))
}

/// Nanoseconds since 1970.
pub(crate) fn get_time(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanoseconds = since.ok().and_then(|since| i64::try_from(since.as_nanos()).ok());
    nanoseconds.map(Value::from).ok_or_else(|| Error::generic("Failed to get time"))
}

pub(crate) fn get_osinfo(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let system = rustix::system::uname();
    let mut info = Map::new();
    let kernel = [
        ("kernel-release", system.release()),
        ("kernel-version", system.version()),
        ("machine", system.machine()),
    ];
    for (member, value) in kernel {
        info.insert(member.into(), value.to_string_lossy().into());
    }
    for (member, value) in os_release::read() {
        info.insert(member.into(), value.into());
    }
    Ok(Value::Object(info))
}
