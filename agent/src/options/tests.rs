use super::*;

fn parsed(line: &str) -> Result<Parsed, String> {
    let nowhere = OsString::from("/nonexistent");
    parse(line.split_whitespace().map(OsString::from), Some(nowhere)).map_err(|error| error.to_string())
}

fn options(line: &str) -> Options {
    match parsed(line) {
        Ok(Parsed::Run(options)) => *options,
        other => panic!("{line}: {other:?}"),
    }
}

fn printed(line: &str) -> String {
    match parsed(line) {
        Ok(Parsed::Print(text)) => String::from_utf8(text).unwrap(),
        other => panic!("{line}: {other:?}"),
    }
}

/// What a configuration and a command line amount to.
fn configured(config: &str, line: &str) -> Options {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config).unwrap();
    options(&format!("-c {} {line}", file.path().display()))
}

#[test]
fn without_arguments_the_agent_serves_the_standard_port() {
    let expected = Options {
        address: Address::VirtioSerial(DEFAULT_PORT.into()),
        statedir: "/run".into(),
        logfile: None,
        verbose: false,
        daemon: false,
        pidfile: "/run/qemu-ga.pid".into(),
        retry_path: false,
        access: Access::default(),
        freeze: FreezeOptions::default(),
    };
    assert_eq!(options(""), expected);
}

#[test]
fn each_method_has_its_address() {
    assert_eq!(options("-m isa-serial").address, Address::IsaSerial("/dev/ttyS0".into()));
    assert_eq!(options("-m unix-listen -p /a").address, Address::UnixListen("/a".into()));
    let vsock = |cid, port| Address::VsockListen { cid, port };
    assert_eq!(options("-m vsock-listen -p 3:1024").address, vsock(3, 1024));
    assert_eq!(options("-m vsock-listen -p 4294967295:5").address, vsock(u32::MAX, 5));
    for path in ["3", "3:", ":1024", "3:1:2", "-1:1", "4294967296:1"] {
        assert!(parsed(&format!("-m vsock-listen -p {path}")).unwrap_err().contains(path), "{path}");
    }
}

#[test]
fn a_channel_without_a_path_is_refused_before_its_method() {
    let no_path = "You must specify a path for this channel";
    assert_eq!(parsed("-m tcp"), Err(no_path.into()));
    assert_eq!(parsed("-m unix-listen"), Err(no_path.into()));
    assert_eq!(parsed("-m vsock-listen"), Err(no_path.into()));
    assert_eq!(parsed("-m tcp -p x"), Err("Unsupported channel method/type: tcp".into()));
}

#[test]
fn times_are_seconds_and_zero_is_for_ever() {
    let freeze = options("--freeze-lease=5 --freeze-timeout 0 --hook-timeout=7").freeze;
    assert_eq!(freeze.lease, Some(Duration::from_secs(5)));
    assert_eq!(freeze.timeout, None);
    assert_eq!(freeze.hook_timeout, Duration::from_secs(7));
    for wrong in ["--freeze-lease=x", "--freeze-timeout=-1", "--freeze-lease=1.5", "--hook-timeout=0"] {
        assert!(parsed(wrong).unwrap_err().contains("is no number of seconds"), "{wrong}");
    }
}

#[test]
fn the_command_line_counts_more_than_the_configuration() {
    let config = "[general]\nmethod=unix-listen\npath=/a\nverbose=true\nstatedir=/s\nfreeze-lease=9\n";
    let both = configured(config, "-p /b -t /t -F/hook");
    assert_eq!(both.address, Address::UnixListen("/b".into()));
    assert_eq!(both.statedir, PathBuf::from("/t"));
    assert_eq!(both.freeze.hook, Some("/hook".into()));
    assert_eq!(both.freeze.lease, Some(Duration::from_secs(9)));
    assert!(both.verbose, "a flag cannot be taken back");
}

#[test]
fn lists_of_both_add_up() {
    let config = "[general]\nblacklist=a,b\nblock-rpcs=c\nallow-rpcs=x;y\n";
    let access = configured(config, "-b d,,e --blacklist f -a z").access;
    assert_eq!(access.block, ["a", "b", "c", "d", "e", "f"]);
    // Semicolons separate nothing.
    assert_eq!(access.allow.unwrap(), ["x;y", "z"]);
    assert_eq!(configured("[general]\nblock-rpcs=\nallow-rpcs=\n", "").access, Access::default());
}

#[test]
fn what_is_dumped_means_the_same() {
    for line in [
        "",
        "-d -v -r -m isa-serial -l /log -f /pid -t /state -F --fsfreeze-hook-dir=/dir",
        "-m vsock-listen -p 2:99 -b a,b -a c --freeze-lease=0 --freeze-timeout=1 --hook-timeout=2",
        "-m unix-listen -p relative -F/a\\b",
    ] {
        let dumped = printed(&format!("{line} -D"));
        assert_eq!(configured(&dumped, ""), options(line), "{dumped}");
    }
}

#[test]
fn what_is_dumped_has_the_keys_of_the_reference_in_its_order() {
    let expected = "[general]\ndaemon=false\nmethod=virtio-serial\n\
        path=/dev/virtio-ports/org.qemu.guest_agent.0\npidfile=/run/qemu-ga.pid\nstatedir=/run\n\
        verbose=false\nretry-path=false\nblock-rpcs=\nallow-rpcs=\n\
        freeze-lease=120\nfreeze-timeout=60\nhook-timeout=30\n";
    assert_eq!(printed("-D"), expected);
}

#[test]
fn some_options_only_print() {
    for line in ["-V", "--version -x", "-v --vers"] {
        assert_eq!(printed(line), concat!("tarn-agent ", env!("CARGO_PKG_VERSION"), "\n"), "{line}");
    }
    for line in ["-b help", "-b ?", "--block-rpcs=help", "-a help"] {
        assert!(printed(line).lines().any(|name| name == "guest-ping"), "{line}");
    }
    assert!(
        printed("-c /nonexistent --help").contains("--freeze-lease"),
        "the configuration does not matter"
    );
}

#[test]
fn the_help_names_every_option() {
    let help = printed("--help");
    for setting in settings::SETTINGS {
        assert!(help.contains(&format!("--{}", setting.long)), "{}", setting.long);
        if let Some(letter) = setting.short {
            assert!(help.contains(&format!("  -{}", char::from(letter))), "{}", setting.long);
        }
    }
    assert!(help.lines().all(|line| line.len() <= 80));
}

#[test]
fn a_daemon_has_absolute_paths() {
    let mut options = options("-m unix-listen -p a -t b -l c -f ./d -Fe --fsfreeze-hook-dir=f");
    options.make_absolute().unwrap();
    let paths = [
        Some(&options.statedir),
        options.logfile.as_ref(),
        Some(&options.pidfile),
        options.freeze.hook.as_ref(),
        options.freeze.hook_dir.as_ref(),
        match &options.address {
            Address::UnixListen(path) => Some(path),
            _ => None,
        },
    ];
    assert!(paths.iter().all(|path| path.is_some_and(|path| path.is_absolute())), "{paths:?}");
}
#[test]
fn the_published_schema_is_that_of_the_commands() {
    let published = concat!(env!("CARGO_MANIFEST_DIR"), "/schema.json");
    let schema = printed("--schema");
    if std::fs::read_to_string(published).unwrap() != schema {
        panic!("agent/schema.json is out of date: cargo run -p agent -- --schema >agent/schema.json");
    }
}
