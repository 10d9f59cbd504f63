//! Disk I/O as the guest sees it: Debian's fio, on a disk of its own so that no initramfs has to carry it.

use std::time::Duration;

use coordinator::GuestSession;
use serde_json::Value;

use crate::agent::guest_output;

/// Where the tools are mounted, and the kernel parameter that does it.
pub const MOUNT: &str = "tarn.mount=serial:tools:/mnt:ext4:ro";

/// One access pattern.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// Part of the figure's name.
    pub name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
    /// Its figure is MiB/s; else I/O operations per second.
    pub sequential: bool,
}

/// All of them, in the order they run: writes before reads, so that nothing is read that is a hole.
pub const JOBS: [Job; 6] = [
    Job { name: "sequential-write", rw: "write", block: "256k", depth: 8, sequential: true },
    Job { name: "sequential-read", rw: "read", block: "256k", depth: 8, sequential: true },
    Job { name: "random-read-1", rw: "randread", block: "4k", depth: 1, sequential: false },
    Job { name: "random-write-1", rw: "randwrite", block: "4k", depth: 1, sequential: false },
    Job { name: "random-read-32", rw: "randread", block: "4k", depth: 32, sequential: false },
    Job { name: "random-write-32", rw: "randwrite", block: "4k", depth: 32, sequential: false },
];

/// Runs all jobs, one after the other, each for `time`, on each of `disks` (their serial numbers): (disk, job, figure).
pub fn run(
    session: &mut GuestSession,
    disks: &[&'static str],
    time: Duration,
) -> Result<Vec<(&'static str, Job, f64)>, String> {
    let runs: Vec<_> = disks.iter().flat_map(|disk| JOBS.map(|job| (*disk, job))).collect();
    let report = guest_output(session, &script(&runs, time), time * u32::try_from(runs.len()).unwrap())
        .map_err(|error| format!("fio: {error}"))?;
    // Warnings come before it.
    let report: Value = serde_json::from_str(&report[report.find('{').unwrap_or(0)..])
        .unwrap_or_else(|error| panic!("fio: {error}:\n{report}"));
    let jobs = report["jobs"].as_array().unwrap();
    assert_eq!(jobs.len(), runs.len(), "{report:#}");
    let results = runs.into_iter().zip(jobs);
    Ok(results.map(|((disk, job), report)| (disk, job, figure(job, report))).collect())
}

fn figure(job: Job, report: &Value) -> f64 {
    let direction = &report[if job.rw.ends_with("read") { "read" } else { "write" }];
    let (member, scale) = if job.sequential { ("bw_bytes", 1048576.0) } else { ("iops", 1.0) };
    direction[member].as_f64().unwrap() / scale
}

fn script(runs: &[(&str, Job)], time: Duration) -> String {
    let mut script = String::from(
        "for disk in /sys/block/vd*; do ln -s /dev/${disk##*/} /dev/$(cat $disk/serial); done\n\
         exec /mnt/ld.so --library-path /mnt/lib /mnt/fio --output-format=json --thread --direct=1 --ioengine=libaio \
         --time_based --randrepeat=1 --norandommap",
    );
    script += &format!(" --runtime={0}ms --ramp_time={1}ms", time.as_millis(), time.as_millis() / 4);
    for (disk, Job { name, rw, block, depth, .. }) in runs {
        script += &format!(
            " --name={name} --stonewall --filename=/dev/{disk} --rw={rw} --bs={block} --iodepth={depth}"
        );
    }
    script
}
