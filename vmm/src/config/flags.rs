//! The `KEY=VALUE,…` texts of `--disk`, `--channel` and `--mount`.
//!
//! Items are parted by commas; a comma inside a value is written twice, as QEMU does. The first item may lack its key
//! where there is an obvious one (`--disk data.img,ro`).

use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;

use super::validate::is_plain_name;
use super::{ChannelSpec, DiskSpec, MAX_SERIAL};

impl DiskSpec {
    /// A disk on `path` with everything else at its default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            id: String::new(),
            path: path.into(),
            format: None,
            read_only: false,
            direct: false,
            cache: super::CacheMode::default(),
            discard: true,
            queues: 1,
            serial: None,
            engine: super::IoEngine::default(),
            rerror: super::ErrorPolicy::Report,
            werror: super::ErrorPolicy::Enospc,
            throttle: super::ThrottleSpec::default(),
            faults: Vec::new(),
        }
    }
}

impl FromStr for DiskSpec {
    type Err = String;

    /// `PATH` or `path=PATH`, then any of `id=`, `format=raw`, `ro[=on|off]`, `direct[=on|off]`, `cache=`, `discard=`,
    /// `queues=`, `serial=`, `engine=`, `rerror=`, `werror=`, and limits by their names in [`super::LIMITS`].
    fn from_str(text: &str) -> Result<Self, String> {
        let mut disk = Self::new("");
        for (index, (key, value)) in items(text).into_iter().enumerate() {
            match (key.as_str(), value) {
                (_, None) if index == 0 => disk.path = key.into(),
                ("path", Some(value)) => disk.path = value.into(),
                ("id", Some(value)) => disk.id = value,
                ("serial", Some(value)) => disk.serial = Some(value),
                ("format", Some(value)) => disk.format = Some(choice("format", &value)?),
                ("ro" | "read-only" | "readonly", value) => disk.read_only = switch("ro", value.as_deref())?,
                ("direct", value) => disk.direct = switch("direct", value.as_deref())?,
                ("discard", value) => disk.discard = switch("discard", value.as_deref())?,
                ("cache", Some(value)) => disk.cache = choice("cache", &value)?,
                ("engine", Some(value)) => disk.engine = choice("engine", &value)?,
                ("rerror", Some(value)) => disk.rerror = choice("rerror", &value)?,
                ("werror", Some(value)) => disk.werror = choice("werror", &value)?,
                ("queues", Some(value)) => {
                    disk.queues = value.parse().map_err(|_| format!("queues={value} is not 1 to 16"))?;
                }
                (
                    "path" | "id" | "serial" | "format" | "cache" | "engine" | "rerror" | "werror" | "queues",
                    None,
                ) => {
                    return Err(format!("{key} needs a value, as in {key}=…"));
                }
                (_, Some(value)) if disk.throttle.knows(&key) => disk.throttle.set(&key, &value)?,
                (_, None) if disk.throttle.knows(&key) => {
                    return Err(format!("{key} needs a value, as in {key}=…"));
                }
                _ => {
                    return Err(format!(
                        "{key:?} is none of path, id, format, ro, direct, cache, discard, queues, serial, engine, \
                         rerror, werror, bps, iops and their kind (a comma in a path is written twice)"
                    ));
                }
            }
        }
        if disk.path.as_os_str().is_empty() { Err("a disk needs path=FILE".into()) } else { Ok(disk) }
    }
}

impl FromStr for ChannelSpec {
    type Err = String;

    /// `name=PORT,socket=PATH`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (mut name, mut socket) = (None, None);
        for (key, value) in items(text) {
            match (key.as_str(), value) {
                ("name", Some(value)) => name = Some(value),
                ("socket", Some(value)) => socket = Some(PathBuf::from(value)),
                _ => return Err(format!("{key:?} is not name=PORT or socket=PATH")),
            }
        }
        match (name, socket) {
            (Some(name), Some(socket)) => Ok(Self { name, socket }),
            _ => Err("a channel needs both name=PORT and socket=PATH".into()),
        }
    }
}

/// `--mount DISK:DIR:FSTYPE[:OPTIONS]`: a filesystem that the guest image's init mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountFlag {
    /// `/dev/…` in the guest, or the id of one of the VM's disks.
    pub disk: String,
    /// Where to mount it; absolute.
    pub dir: String,
    /// As mount(8) takes it.
    pub fstype: String,
    /// Mount options, comma-separated.
    pub options: Option<String>,
}

impl FromStr for MountFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "a mount is DISK:DIR:FSTYPE[:OPTIONS], as in /dev/vda:/data:ext4";
        if text.chars().any(|c| c.is_whitespace() || c.is_control() || c == '"') {
            return Err(format!("{FORM}, without blanks or quotes"));
        }
        let mut parts = text.splitn(4, ':').map(str::to_owned);
        let mut next = || parts.next().filter(|part| !part.is_empty());
        let (Some(disk), Some(dir), Some(fstype)) = (next(), next(), next()) else {
            return Err(FORM.into());
        };
        if !dir.starts_with('/') {
            return Err(format!("{FORM}; {dir:?} is not absolute"));
        }
        Ok(Self { disk, dir, fstype, options: next() })
    }
}

impl MountFlag {
    /// The kernel command-line word that asks the guest image's init for this mount: by the disk's serial, which stays the
    /// same whatever order the guest finds its disks in, where it can be written in such a word.
    ///
    /// # Errors
    /// `disk` is neither a path nor the id of one of `disks`.
    pub fn command_line_word(&self, disks: &[DiskSpec]) -> Result<String, String> {
        let device = if self.disk.starts_with('/') {
            self.disk.clone()
        } else {
            let index = disks.iter().position(|disk| disk.id == self.disk).ok_or_else(|| {
                format!("No disk has the id {:?} that is to be mounted on {}", self.disk, self.dir)
            })?;
            let serial = |disk: &DiskSpec| disk.serial.clone().unwrap_or_else(|| disk.id.clone());
            let own = serial(&disks[index]);
            let unique = disks.iter().filter(|disk| serial(disk) == own).count() == 1;
            if unique && is_plain_name(&own, MAX_SERIAL) {
                format!("serial:{own}")
            } else {
                guest_device(index)
            }
        };
        let options = self.options.as_ref().map(|options| format!(":{options}")).unwrap_or_default();
        Ok(format!("tarn.mount={device}:{}:{}{options}", self.dir, self.fstype))
    }
}

/// What the guest calls its disk number `index`: `/dev/vda`, …, `/dev/vdz`, `/dev/vdaa`, … (Linux, `virtblk_name_format`).
pub fn guest_device(index: usize) -> String {
    let mut letters = Vec::new();
    let mut rest = Some(index);
    while let Some(n) = rest {
        letters.push(char::from(b"abcdefghijklmnopqrstuvwxyz"[n % 26]));
        rest = (n / 26).checked_sub(1);
    }
    format!("/dev/vd{}", letters.iter().rev().collect::<String>())
}

/// Splits at single commas, then each item at its first `=`.
pub(super) fn items(text: &str) -> Vec<(String, Option<String>)> {
    let (mut parts, mut part) = (Vec::new(), String::new());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(std::mem::take(&mut part));
        } else {
            part.push(c);
        }
    }
    parts.push(part);
    parts
        .into_iter()
        .map(|part| match part.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (part, None),
        })
        .collect()
}

fn switch(key: &str, value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("on" | "true" | "yes") => Ok(true),
        Some("off" | "false" | "no") => Ok(false),
        Some(value) => Err(format!("{key}={value} is neither on nor off")),
    }
}

pub(super) fn choice<T: ValueEnum>(key: &str, value: &str) -> Result<T, String> {
    T::from_str(value, false).map_err(|_| {
        let known: Vec<_> = T::value_variants()
            .iter()
            .filter_map(|variant| variant.to_possible_value().map(|name| name.get_name().to_owned()))
            .collect();
        format!("{key}={value} is none of {}", known.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CacheMode, ErrorPolicy, ImageFormat, IoEngine};

    #[test]
    fn a_bare_path_is_a_disk() {
        assert_eq!("data.img".parse(), Ok(DiskSpec::new("data.img")));
        assert_eq!("data.img,ro".parse(), Ok(DiskSpec { read_only: true, ..DiskSpec::new("data.img") }));
    }

    #[test]
    fn every_key_of_a_disk_is_understood() {
        let text = "path=/a,id=root,format=raw,ro,direct=on,cache=unsafe,queues=4,serial=S1,engine=threads,rerror=stop,\
                    werror=ignore,discard=off";
        let disk = DiskSpec {
            id: "root".into(),
            format: Some(ImageFormat::Raw),
            read_only: true,
            direct: true,
            cache: CacheMode::Unsafe,
            discard: false,
            queues: 4,
            serial: Some("S1".into()),
            engine: IoEngine::Threads,
            rerror: ErrorPolicy::Stop,
            werror: ErrorPolicy::Ignore,
            ..DiskSpec::new("/a")
        };
        assert_eq!(text.parse(), Ok(disk));
    }

    #[test]
    fn a_doubled_comma_is_a_comma_in_the_value() {
        assert_eq!("path=/a,,b=c,ro".parse(), Ok(DiskSpec { read_only: true, ..DiskSpec::new("/a,b=c") }));
    }

    #[test]
    fn wrong_disk_items_are_named() {
        for (text, part) in [
            ("", "needs path"),
            ("id=x", "needs path"),
            ("a.img,b.img", "\"b.img\" is none of"),
            ("a.img,cache=none", "cache=none is none of writeback, writethrough, unsafe"),
            ("a.img,format=qcow2", "format=qcow2 is none of raw"),
            ("a.img,ro=maybe", "ro=maybe"),
            ("a.img,queues=many", "queues=many"),
            ("a.img,cache", "cache needs a value"),
        ] {
            let error = text.parse::<DiskSpec>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_channel_needs_name_and_socket() {
        let channel = ChannelSpec { name: "org.x.0".into(), socket: "/tmp/x".into() };
        assert_eq!("name=org.x.0,socket=/tmp/x".parse(), Ok(channel));
        assert!("name=a".parse::<ChannelSpec>().unwrap_err().contains("both"));
        assert!("name=a,sock=b".parse::<ChannelSpec>().unwrap_err().contains("\"sock\""));
    }

    #[test]
    fn a_mount_becomes_a_word_of_the_command_line() {
        let disk = |id: &str, serial: Option<&str>| DiskSpec {
            id: id.into(),
            serial: serial.map(str::to_owned),
            ..DiskSpec::new("b")
        };
        let disks =
            [disk("disk0", None), disk("data", None), disk("log", Some("S1")), disk("x", Some("a:b"))];
        let word = |text: &str| text.parse::<MountFlag>().and_then(|mount| mount.command_line_word(&disks));
        assert_eq!(word("/dev/vda:/data:ext4"), Ok("tarn.mount=/dev/vda:/data:ext4".into()));
        assert_eq!(word("data:/d:xfs:ro,noatime"), Ok("tarn.mount=serial:data:/d:xfs:ro,noatime".into()));
        assert_eq!(word("log:/l:xfs"), Ok("tarn.mount=serial:S1:/l:xfs".into()));
        assert_eq!(word("x:/x:xfs"), Ok("tarn.mount=/dev/vdd:/x:xfs".into()));
        assert!(word("other:/d:xfs").unwrap_err().contains("\"other\""));
        for bad in ["", "/dev/vda", "/dev/vda:/data", "/dev/vda:data:ext4", "/dev/vda:/a b:ext4", "::"] {
            assert!(word(bad).unwrap_err().contains("DISK:DIR:FSTYPE"), "{bad}");
        }
    }

    #[test]
    fn guest_device_names_count_like_linux() {
        let names: Vec<_> = [0, 1, 25, 26, 27, 51, 52, 701, 702].into_iter().map(guest_device).collect();
        let expected = ["a", "b", "z", "aa", "ab", "az", "ba", "zz", "aaa"].map(|s| format!("/dev/vd{s}"));
        assert_eq!(names, expected);
    }
}
