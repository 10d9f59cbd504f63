//! A filesystem's name on its way to the watchdog and back.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::mounts::Device;

/// What has to be known of a filesystem beside its descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) mountpoint: PathBuf,
    /// Its `s_dev`.
    pub(crate) identity: Device,
    pub(crate) device: Device,
    pub(crate) fstype: String,
}

impl Label {
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "mountpoint": self.mountpoint.to_string_lossy(),
            "identity": [self.identity.0, self.identity.1],
            "device": [self.device.0, self.device.1],
            "type": self.fstype,
        })
    }

    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        let device = |name: &str| {
            let number = |index: usize| u32::try_from(value[name][index].as_u64()?).ok();
            Some((number(0)?, number(1)?))
        };
        Some(Self {
            mountpoint: value["mountpoint"].as_str()?.into(),
            identity: device("identity")?,
            device: device("device")?,
            fstype: value["type"].as_str()?.to_owned(),
        })
    }
}
