//! What a VM is made of.

use devices::virtio::blk::BlkBackend;
use devices::virtio::console::PortSpec;
use kvm_ioctls::Kvm;

use crate::boot::BootFiles;
use crate::config::{DiskSpec, VmSpec};
use crate::jobs::nodes::{NodeSource, NodeSpec, Nodes};
use crate::machine::builder::{self, MachineError, Parts};
use crate::machine::notify::Notifier;
use crate::machine::{Kept, Machine};

/// What a VM is made of, whatever becomes of its machine.
pub struct Fixed {
    /// The configuration.
    pub spec: VmSpec,
    /// /dev/kvm.
    pub kvm: Kvm,
    /// Kernel, initrd, command line.
    pub boot: BootFiles,
    /// Disks in order, with their threads and locks.
    pub disks: Vec<BlkBackend>,
    /// Ports of the virtio-serial device.
    pub ports: Vec<PortSpec>,
    /// Where other threads report.
    pub events: Notifier,
}

impl Fixed {
    pub(super) fn build(&self, number: u64, kept: Option<&Kept>) -> Result<Machine, MachineError> {
        let Self { spec, kvm, boot, disks, ports, events } = self;
        let events = &events.for_machine(number);
        builder::build(&Parts { spec, kvm, boot, disks, ports, events }, kept)
    }

    /// What the disks work on at the start.
    pub(super) fn nodes(&self) -> Nodes {
        let node = |(disk, backend): (&DiskSpec, &BlkBackend)| {
            let facts = backend.facts();
            let spec = NodeSpec {
                read_only: facts.read_only,
                direct: facts.direct,
                cache: facts.cache,
                discard: facts.discard,
                filters: facts.node_filters,
                ..NodeSpec::new(NodeSource::Path(disk.path.clone()))
            };
            (None, spec)
        };
        Nodes::new(self.spec.disks.iter().zip(&self.disks).map(node))
    }
}
