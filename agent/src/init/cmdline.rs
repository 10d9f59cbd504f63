//! The kernel's command line.

use std::fs;
use std::path::PathBuf;

/// What the command line asks of init.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Cmdline {
    pub(super) mounts: Vec<MountSpec>,
    /// Swap space, and the image of a hibernated guest.
    pub(super) resume: Option<DeviceName>,
    /// Another agent: the program and its arguments.
    pub(super) agent: Option<Vec<String>>,
    /// A shell is wanted; on this terminal, or on the console.
    pub(super) shell: Option<Option<String>>,
    pub(super) hostname: String,
}

/// One `tarn.mount=`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MountSpec {
    pub(super) device: DeviceName,
    pub(super) directory: PathBuf,
    pub(super) fstype: String,
    /// Comma-separated, as mount(8) takes them.
    pub(super) options: String,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum DeviceName {
    Path(PathBuf),
    /// The serial number the host gave the disk.
    Serial(String),
}

impl Cmdline {
    /// What `/proc/cmdline` says.
    pub(super) fn read() -> Self {
        let text = fs::read_to_string("/proc/cmdline").unwrap_or_else(|error| {
            super::say!("cannot read /proc/cmdline: {error}");
            String::new()
        });
        Self::parse(&text)
    }

    fn parse(text: &str) -> Self {
        let mut parsed = Self { hostname: "tarn".into(), ..Self::default() };
        for word in words(text) {
            let (key, value) = match word.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (word.as_str(), None),
            };
            match (key, value) {
                ("tarn.mount", Some(value)) => match MountSpec::parse(value) {
                    Some(spec) => parsed.mounts.push(spec),
                    None => super::say!("tarn.mount={value}: expected DEVICE:DIR:FSTYPE[:OPTIONS]"),
                },
                ("tarn.resume", Some(value)) if !value.is_empty() => {
                    parsed.resume = Some(DeviceName::parse(value));
                }
                ("tarn.agent", Some(value)) if !value.is_empty() => {
                    parsed.agent = Some(value.split(',').map(str::to_owned).collect());
                }
                ("tarn.shell", value) => parsed.shell = Some(value.map(str::to_owned)),
                ("tarn.hostname", Some(value)) if !value.is_empty() => parsed.hostname = value.into(),
                _ => {}
            }
        }
        parsed
    }
}

/// Words between white space; double quotes, as everywhere on this line, keep white space in a word.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for character in text.chars() {
        match character {
            '"' => quoted = !quoted,
            space if space.is_whitespace() && !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            other => word.push(other),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

impl DeviceName {
    fn parse(text: &str) -> Self {
        match text.strip_prefix("serial:") {
            Some(id) => Self::Serial(id.into()),
            None => Self::Path(text.into()),
        }
    }
}

impl MountSpec {
    fn parse(text: &str) -> Option<Self> {
        let (device, rest) = match text.strip_prefix("serial:") {
            Some(text) => text.split_once(':').map(|(id, rest)| (DeviceName::Serial(id.into()), rest))?,
            None => text.split_once(':').map(|(path, rest)| (DeviceName::Path(path.into()), rest))?,
        };
        let mut fields = rest.splitn(3, ':');
        let directory = fields.next().filter(|directory| directory.starts_with('/'))?;
        let fstype = fields.next().filter(|fstype| !fstype.is_empty())?;
        // The type names a file below /etc/tarn/modules.d.
        let is_name = fstype.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
        let options = fields.next().unwrap_or_default();
        is_name.then(|| Self {
            device,
            directory: directory.into(),
            fstype: fstype.into(),
            options: options.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_keep_their_order_and_options() {
        let parsed = Cmdline::parse(
            "console=hvc0 tarn.mount=/dev/vda:/data:ext4 tarn.mount=serial:disk-1:/x:xfs:ro,noatime,a=b:c\n",
        );
        let expected = [
            MountSpec {
                device: DeviceName::Path("/dev/vda".into()),
                directory: "/data".into(),
                fstype: "ext4".into(),
                options: String::new(),
            },
            MountSpec {
                device: DeviceName::Serial("disk-1".into()),
                directory: "/x".into(),
                fstype: "xfs".into(),
                options: "ro,noatime,a=b:c".into(),
            },
        ];
        assert_eq!(parsed.mounts, expected);
        assert_eq!((parsed.hostname.as_str(), parsed.shell, parsed.agent), ("tarn", None, None));
    }

    #[test]
    fn an_agent_of_the_users_own_comes_with_arguments() {
        let parsed = Cmdline::parse("tarn.agent=/usr/sbin/qemu-ga,-m,virtio-serial tarn.hostname=vm");
        assert_eq!(parsed.agent.unwrap(), ["/usr/sbin/qemu-ga", "-m", "virtio-serial"]);
        assert_eq!(parsed.hostname, "vm");
    }

    #[test]
    fn an_image_to_resume_from_is_on_a_device_like_any_other() {
        let resume = |text: &str| Cmdline::parse(text).resume;
        assert_eq!(resume("tarn.resume=/dev/vdb"), Some(DeviceName::Path("/dev/vdb".into())));
        assert_eq!(resume("tarn.resume=serial:swap"), Some(DeviceName::Serial("swap".into())));
        assert_eq!(resume("tarn.resume= tarn.resume resume=/dev/vda"), None);
    }

    #[test]
    fn a_shell_may_name_its_terminal() {
        assert_eq!(Cmdline::parse("quiet tarn.shell").shell, Some(None));
        assert_eq!(Cmdline::parse("tarn.shell=ttyS0").shell, Some(Some("ttyS0".into())));
        assert_eq!(Cmdline::parse("tarn.shells").shell, None);
    }

    #[test]
    fn quotes_keep_spaces() {
        assert_eq!(words("a \"b c\"=d\te\n"), ["a", "b c=d", "e"]);
    }

    #[test]
    fn malformed_mounts_are_left_out() {
        for bad in
            ["", "/dev/vda", "/dev/vda:/x", "/dev/vda:x:ext4", "/dev/vda:/x:", "serial:a", "/dev/vda:/x:../y"]
        {
            assert_eq!(MountSpec::parse(bad), None, "{bad}");
        }
    }
}
