use clap::{CommandFactory, Parser, ValueEnum};

use super::*;
use crate::config::format_size;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    run: RunArgs,
}

fn parse(line: &str) -> RunArgs {
    Line::try_parse_from(std::iter::once("run").chain(line.split_whitespace())).unwrap().run
}

fn spec(line: &str) -> VmSpec {
    let spec = parse(line).to_spec().unwrap();
    spec.validate().unwrap();
    spec
}

fn refusal(line: &str) -> String {
    match Line::try_parse_from(std::iter::once("run").chain(line.split_whitespace())) {
        Ok(line) => format!("{:#}", line.run.to_spec().unwrap_err()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn flags_make_a_vm() {
    let spec = spec(
        "--name web --kernel /k --initrd /i --initrd /j --cpus 4 --memory 2G --huge-pages --prefault --boot pvh \
         --disk a.img --disk path=b.img,id=data,ro --channel name=org.x.0,socket=/s --console serial \
         --on-guest-shutdown exit:3 --on-guest-reset pause --on-guest-panic reset --paused --thaw-grace 5",
    );
    assert_eq!((spec.name.as_str(), spec.kernel.as_path()), ("web", Path::new("/k")));
    assert_eq!(spec.initrd, [Path::new("/i"), Path::new("/j")]);
    assert_eq!((spec.cpus, spec.memory.size, spec.boot), (4, 2 << 30, BootProtocol::Pvh));
    assert!(spec.memory.huge_pages && spec.memory.prefault && spec.start_paused);
    assert_eq!(spec.disks.iter().map(|disk| disk.id.as_str()).collect::<Vec<_>>(), ["disk0", "data"]);
    assert_eq!(spec.channels[0].name, "org.x.0");
    assert_eq!(spec.on_guest.shutdown, GuestAction::Exit(3));
    assert_eq!((spec.on_guest.reset, spec.on_guest.panic), (GuestAction::Pause, GuestAction::Reset));
    assert_eq!((spec.console, spec.thaw_grace), (ConsoleSpec::Serial, 5));
    assert!(spec.cmdline.starts_with("console=ttyS0 "));
    assert_eq!(spec.uuid.get_version_num(), 4);
}

#[test]
fn what_dry_run_prints_gives_the_same_vm_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.json");
    for line in [
        "--kernel /k",
        "--kernel /k --initrd /i --disk a,,b.img,ro,queues=2 --disk b.img,id=x --mount x:/d:ext4 --append debug \
         --on-guest-panic pause --memory 1536K --channel name=c,socket=/s",
        "--name none --kernel /k --cmdline= --console none",
        "--kernel /k --disk a.img,bps=1M,iops-rd=5 --fault disk0:op=write,errno=EIO,sector=8 --fault disk0:op=any,delay-ms=5",
    ] {
        let first = spec(line);
        fs::write(&file, serde_json::to_string_pretty(&first).unwrap()).unwrap();
        assert_eq!(spec(&format!("--config {}", file.display())), first, "{line}");
    }
}

#[test]
fn flags_override_a_configuration_and_lists_are_added() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.json");
    let text = r#"{"name": "a", "kernel": "/k", "cpus": 2, "cmdline": "quiet", "memory": {"size": "1G"},
        "disks": [{"path": "a.img"}], "console": "none"}"#;
    fs::write(&file, text).unwrap();
    let file = file.display();
    let spec = spec(&format!("--config {file} --name b --cpus 3 --disk b.img --append x=1 --append y"));
    assert_eq!((spec.name.as_str(), spec.cpus, spec.memory.size), ("b", 3, 1 << 30));
    assert_eq!(spec.disks.iter().map(|disk| disk.id.as_str()).collect::<Vec<_>>(), ["disk0", "disk1"]);
    assert_eq!((spec.cmdline.as_str(), spec.console), ("quiet x=1 y", ConsoleSpec::None));
}

#[test]
fn the_command_line_is_the_usual_one_unless_one_is_given() {
    let usual = spec("--kernel /k --append a=b --disk d.img --mount /dev/vda:/data:ext4 --shell").cmdline;
    assert!(usual.starts_with("console=hvc0 "));
    assert!(usual.ends_with(" tarn.mount=/dev/vda:/data:ext4 tarn.shell a=b"));
    assert_eq!(spec("--kernel /k --cmdline quiet --append x").cmdline, "quiet x");
    assert_eq!(spec("--kernel /k --cmdline= --append x").cmdline, "x");
}

#[test]
fn names_are_made_up_and_differ_from_ids() {
    let spec = spec("--kernel /k");
    assert_eq!(spec.name, format!("vm-{}", std::process::id()));
}

#[test]
fn exec_never_starts_the_guest_twice_unless_told_to() {
    assert_eq!(spec("--kernel /k --exec true").on_guest.reset, GuestAction::Exit(0));
    assert_eq!(spec("--kernel /k --exec true --on-guest-reset reset").on_guest.reset, GuestAction::Reset);
}

#[test]
fn wrong_flags_are_refused_with_what_is_wrong() {
    for (line, part) in [
        ("--memory 12Q", "\"12Q\""),
        ("--cpus many", "many"),
        ("--boot bios", "bios"),
        ("--fault disk0:op=write", "needs an errno"),
        (
            "--kernel /k --disk a.img --fault vda:op=write,errno=EIO",
            "No disk has the id \"vda\" that a fault is for",
        ),
        ("--disk a.img,cache=none", "cache=none"),
        ("--mount vda", "DISK:DIR:FSTYPE"),
        ("--kernel /k --mount data:/d:ext4", "No disk has the id \"data\""),
        ("--on-guest-reset explode", "explode"),
        ("--detach --exec true", "cannot be used with"),
        ("--config /nonexistent.json", "Cannot read configuration \"/nonexistent.json\""),
    ] {
        let error = refusal(line);
        assert!(error.contains(part), "{line}: {error}");
    }
}

#[test]
fn a_wrong_configuration_is_named_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.json");
    for (text, part) in
        [("{", "line 1"), ("{\n\"cpu\": 1}", "unknown field `cpu`"), ("{\n\"cpus\": 300}", "line 2")]
    {
        fs::write(&file, text).unwrap();
        let error = refusal(&format!("--config {}", file.display()));
        assert!(error.contains("vm.json") && error.contains(part), "{error}");
    }
}

#[test]
fn the_help_tells_the_defaults_that_are_used() {
    fn name(value: &impl ValueEnum) -> String {
        value.to_possible_value().unwrap().get_name().to_owned()
    }
    let spec = VmSpec::default();
    let mut defaults = vec![
        ("boot", name(&spec.boot)),
        ("cpus", spec.cpus.to_string()),
        ("memory", format_size(spec.memory.size)),
        ("console", name(&spec.console)),
        ("on_guest_shutdown", spec.on_guest.shutdown.into()),
        ("on_guest_reset", spec.on_guest.reset.into()),
        ("on_guest_panic", spec.on_guest.panic.into()),
        ("thaw_grace", spec.thaw_grace.to_string()),
        ("name", "made up".to_owned()),
    ];
    // Each that is told in words is one of these; clap itself tells those it knows.
    let command = Line::command();
    for argument in command.get_arguments() {
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let told =
            help.split_once("[default: ").and_then(|(_, rest)| rest.split_once(']')).map(|(told, _)| told);
        let at = defaults.iter().position(|(id, _)| *id == argument.get_id().as_str());
        let expected = at.map(|at| defaults.remove(at).1);
        assert_eq!(told, expected.as_deref(), "{}", argument.get_id());
    }
    assert_eq!(defaults, []);
}
