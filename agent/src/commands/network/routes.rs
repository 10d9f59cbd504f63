//! Routes: `/proc/net/route` and `/proc/net/ipv6_route` (Linux `net/ipv4/fib_trie.c`,
//! `fib_route_seq_show`, and `net/ipv6/route.c`, `rt6_native_info_route`).

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr};

use protocol::{Args, Error};
use serde_json::{Value, json};

use crate::commands::failed;
use crate::commands::root::{Root, digits};
use crate::guest::Guest;
use crate::log;
use crate::schema::{Type, optional, required};

pub(super) const ROUTE: Type = Type::Object(&[
    required("iface", Type::Str),
    required("destination", Type::Str),
    required("metric", Type::Int),
    required("version", Type::Int),
    optional("gateway", Type::Str),
    optional("mask", Type::Str),
    optional("irtt", Type::Int),
    optional("flags", Type::Int),
    optional("refcnt", Type::Int),
    optional("use", Type::Int),
    optional("window", Type::Int),
    optional("mtu", Type::Int),
    optional("desprefixlen", Type::Str),
    optional("source", Type::Str),
    optional("srcprefixlen", Type::Str),
    optional("nexthop", Type::Str),
]);

const IPV4: &str = "/proc/net/route";
const IPV6: &str = "/proc/net/ipv6_route";
/// Most routes of each table. A router's table can have a million; clients refuse replies over 10 MiB.
const ROUTES: usize = 4096;

pub(super) fn get_route(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    routes(&Root::guest())
}

fn routes(root: &Root) -> Result<Value, Error> {
    let open = |path: &str| root.text(path).map_err(|error| (format!("open(\"{path}\")"), error));
    let ipv4 = open(IPV4).map_err(|(what, error)| failed(what, &error))?;
    let ipv6 = match open(IPV6) {
        // A kernel without IPv6.
        Err((_, error)) if error.kind() == ErrorKind::NotFound => String::new(),
        text => text.map_err(|(what, error)| failed(what, &error))?,
    };
    let mut routes = table(IPV4, ipv4.lines().filter_map(ipv4_route));
    routes.extend(table(IPV6, ipv6.lines().filter_map(ipv6_route)));
    Ok(routes.into())
}

fn table(path: &str, mut routes: impl Iterator<Item = Value>) -> Vec<Value> {
    let first = routes.by_ref().take(ROUTES).collect();
    if routes.next().is_some() {
        log::warning(format_args!("{path} has more than {ROUTES} routes; the others are not told"));
    }
    first
}

/// `iface destination gateway flags refcnt use metric mask mtu window irtt`: addresses as the
/// hexadecimal digits of the number that they are in memory, flags hexadecimal, the rest decimal. `None` for the heading.
fn ipv4_route(line: &str) -> Option<Value> {
    let mut fields = line.split_ascii_whitespace();
    let iface = fields.next()?;
    let destination = ipv4(fields.next()?)?;
    let gateway = ipv4(fields.next()?)?;
    let flags = hex32(fields.next()?)?;
    let [refcnt, used, metric]: [u64; 3] =
        [digits(fields.next()?)?, digits(fields.next()?)?, digits(fields.next()?)?];
    let mask = ipv4(fields.next()?)?;
    let [mtu, window, irtt]: [u64; 3] =
        [digits(fields.next()?)?, digits(fields.next()?)?, digits(fields.next()?)?];
    Some(json!({
        "iface": iface, "destination": destination, "metric": metric, "version": 4, "gateway": gateway,
        "mask": mask, "irtt": irtt, "flags": flags, "refcnt": refcnt, "use": used, "window": window, "mtu": mtu,
    }))
}

/// `destination length source length nexthop metric refcnt use flags iface`, all numbers hexadecimal.
fn ipv6_route(line: &str) -> Option<Value> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [destination, length, source, source_length, nexthop, metric, refcnt, used, flags, iface] =
        fields[..]
    else {
        return None;
    };
    Some(json!({
        "iface": iface, "destination": ipv6(destination)?, "metric": hex32(metric)?, "version": 6,
        "flags": hex32(flags)?, "refcnt": hex32(refcnt)?, "use": hex32(used)?,
        "desprefixlen": prefix(length)?, "source": ipv6(source)?, "srcprefixlen": prefix(source_length)?,
        "nexthop": ipv6(nexthop)?,
    }))
}

fn hex32(text: &str) -> Option<u32> {
    text.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

fn ipv4(text: &str) -> Option<String> {
    hex32(text).map(|address| Ipv4Addr::from(address.to_ne_bytes()).to_string())
}

fn ipv6(text: &str) -> Option<String> {
    let is_address = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let bits = is_address.then(|| u128::from_str_radix(text, 16).ok()).flatten()?;
    Some(Ipv6Addr::from(bits).to_string())
}

/// A prefix's length, which clients get as a string.
fn prefix(text: &str) -> Option<String> {
    hex32(text).filter(|&length| length <= 128).map(|length| length.to_string())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const TABLE4: &str = "\
Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth0	00000000	010200C0	0003	0	0	0	00000000	0	0	0
eth0	000200C0	00000000	0001	0	0	0	00FFFFFF	0	0	0
";
    const TABLE6: &str = "\
fd000000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000000000000000000000000000001 00000400 00000002 00000000 00000003     eth0
00000000000000000000000000000001 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000002 00000000 80200001       lo
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
";

    fn machine(ipv4: Option<&str>, ipv6: Option<&str>) -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::at(directory.path());
        fs::create_dir_all(root.join("/proc/net")).unwrap();
        for (path, text) in [(IPV4, ipv4), (IPV6, ipv6)] {
            if let Some(text) = text {
                fs::write(root.join(path), text).unwrap();
            }
        }
        (directory, root)
    }

    #[test]
    fn routes_are_as_recorded_but_for_the_sign_of_the_flags() {
        let (_directory, root) = machine(Some(TABLE4), Some(TABLE6));
        let value = routes(&root).unwrap();
        Type::Array(&ROUTE).check(&value).unwrap();
        let recorded = json!([
            {"flags": 3, "metric": 0, "refcnt": 0, "window": 0, "version": 4, "iface": "eth0",
                "destination": "0.0.0.0", "irtt": 0, "gateway": "192.0.2.1", "use": 0, "mtu": 0, "mask": "0.0.0.0"},
            {"flags": 1, "metric": 0, "refcnt": 0, "window": 0, "version": 4, "iface": "eth0",
                "destination": "192.0.2.0", "irtt": 0, "gateway": "0.0.0.0", "use": 0, "mtu": 0,
                "mask": "255.255.255.0"},
            {"flags": 1, "source": "::", "metric": 256, "refcnt": 1, "version": 6, "nexthop": "::",
                "iface": "eth0", "destination": "fd00::", "desprefixlen": "64", "srcprefixlen": "0", "use": 0},
            {"flags": 3, "source": "::", "metric": 1024, "refcnt": 2, "version": 6, "nexthop": "fd00::1",
                "iface": "eth0", "destination": "::", "desprefixlen": "0", "srcprefixlen": "0", "use": 0},
            {"flags": 0x8020_0001_u32, "source": "::", "metric": 0, "refcnt": 2, "version": 6, "nexthop": "::",
                "iface": "lo", "destination": "::1", "desprefixlen": "128", "srcprefixlen": "0", "use": 0},
            {"flags": 0x0020_0200, "source": "::", "metric": u32::MAX, "refcnt": 1, "version": 6, "nexthop": "::",
                "iface": "lo", "destination": "::", "desprefixlen": "0", "srcprefixlen": "0", "use": 0},
        ]);
        assert_eq!(value, recorded);
    }

    #[test]
    fn a_kernel_without_ipv6_has_the_other_routes() {
        let (_directory, root) = machine(Some(TABLE4), None);
        assert_eq!(routes(&root).unwrap().as_array().unwrap().len(), 2);
        let (_directory, root) = machine(None, None);
        let expected = "open(\"/proc/net/route\"): No such file or directory";
        assert_eq!(routes(&root).unwrap_err().desc, expected);
    }

    #[test]
    fn lines_that_are_not_as_documented_are_skipped() {
        for line in [
            "",
            "eth0",
            "eth0 0 0 1 0 0 0 0 0 0",
            "eth0 0 0 1 0 0 -1 0 0 0 0",
            "eth0 1000000000 0 1 0 0 0 0 0 0 0",
            "eth0 +1 0 1 0 0 0 0 0 0 0",
        ] {
            assert_eq!(ipv4_route(line), None, "{line}");
        }
        let zero = "0".repeat(32);
        let good = format!("{zero} 00 {zero} 00 {zero} 0 0 0 0 lo");
        assert!(ipv6_route(&good).is_some());
        for line in [
            String::new(),
            format!("{good} more"),
            good.replace(" 00 ", " 81 "),
            good.replacen("00", "0", 1),
            good.replacen("00", "0é", 1),
            good.replacen("00", "+0", 1),
            good.replace(" 0 ", " 100000000 "),
        ] {
            assert_eq!(ipv6_route(&line), None, "{line}");
        }
    }

    #[test]
    fn a_huge_table_is_told_up_to_a_limit() {
        let line = TABLE4.lines().last().unwrap().to_owned() + "\n";
        let (_directory, root) = machine(Some(&line.repeat(ROUTES + 1)), None);
        assert_eq!(routes(&root).unwrap().as_array().unwrap().len(), ROUTES);
    }
}
