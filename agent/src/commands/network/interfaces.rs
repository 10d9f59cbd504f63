//! Network interfaces and their addresses.

use std::collections::BTreeMap;

use protocol::{Args, Error, Map};
use serde_json::{Value, json};

use super::netlink::{self, Address, Link, STATISTICS};
use crate::commands::failed;
use crate::guest::Guest;
use crate::schema::{Type, optional, required};

pub(super) const INTERFACE: Type = Type::Object(&[
    required("name", Type::Str),
    optional("hardware-address", Type::Str),
    optional(
        "ip-addresses",
        Type::Array(&Type::Object(&[
            required("ip-address", Type::Str),
            required("ip-address-type", Type::Enum(&["ipv4", "ipv6"])),
            required("prefix", Type::Int),
        ])),
    ),
    optional(
        "statistics",
        Type::Object(&[
            required("rx-bytes", Type::Int),
            required("rx-packets", Type::Int),
            required("rx-errs", Type::Int),
            required("rx-dropped", Type::Int),
            required("tx-bytes", Type::Int),
            required("tx-packets", Type::Int),
            required("tx-errs", Type::Int),
            required("tx-dropped", Type::Int),
        ]),
    ),
]);

/// The kernel's counters in its order.
const COUNTERS: [&str; STATISTICS] =
    ["rx-packets", "tx-packets", "rx-bytes", "tx-bytes", "rx-errs", "tx-errs", "rx-dropped", "tx-dropped"];

/// Bytes of a hardware address as clients know it.
const MAC: usize = 6;

pub(super) fn get_interfaces(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let asked = netlink::links().and_then(|links| Ok((links, netlink::addresses()?)));
    let (links, addresses) = asked.map_err(|error| failed("getifaddrs failed", &error))?;
    Ok(interfaces(&links, addresses))
}

/// Interfaces in the kernel's order; after each its aliases, which are addresses with another name.
fn interfaces(links: &[Link], addresses: Vec<Address>) -> Value {
    let mut of_link: BTreeMap<u32, Vec<Address>> = BTreeMap::new();
    for address in addresses {
        of_link.entry(address.link).or_default().push(address);
    }
    let mut interfaces = Vec::new();
    for link in links {
        let (mut own, mut aliases): (Vec<Address>, BTreeMap<String, Vec<Address>>) = Default::default();
        for address in of_link.remove(&link.index).unwrap_or_default() {
            match &address.label {
                Some(label) if *label != link.name => aliases.entry(label.clone()).or_default().push(address),
                _ => own.push(address),
            }
        }
        interfaces.push(interface(link, &link.name, &own));
        interfaces.extend(aliases.iter().map(|(name, addresses)| interface(link, name, addresses)));
    }
    interfaces.into()
}

fn interface(link: &Link, name: &str, addresses: &[Address]) -> Value {
    let mut interface = Map::from_iter([("name".into(), name.into())]);
    if let Some(address) = &link.address {
        interface.insert("hardware-address".into(), hardware_address(address).into());
    }
    if !addresses.is_empty() {
        let ips = addresses.iter().map(|address| {
            let kind = if address.ip.is_ipv4() { "ipv4" } else { "ipv6" };
            json!({"ip-address": address.ip.to_string(), "ip-address-type": kind, "prefix": address.prefix})
        });
        interface.insert("ip-addresses".into(), ips.collect());
        // The counters are the interface's and not its aliases'.
        if let Some(counters) = link.statistics.filter(|_| name == link.name) {
            let statistics: Map =
                COUNTERS.iter().zip(counters).map(|(&name, count)| (name.to_owned(), count.into())).collect();
            interface.insert("statistics".into(), statistics.into());
        }
    }
    interface.into()
}

/// Six bytes, whatever the link's own addresses are like.
fn hardware_address(address: &[u8]) -> String {
    let bytes = address.iter().chain(&[0; MAC]).take(MAC);
    bytes.map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn link(index: u32, name: &str, address: Option<&[u8]>) -> Link {
        Link {
            index,
            name: name.into(),
            address: address.map(<[u8]>::to_vec),
            statistics: Some([1, 2, 3, 4, 5, 6, 7, u64::MAX]),
        }
    }

    fn address(link: u32, ip: &str, prefix: u8, label: Option<&str>) -> Address {
        Address { link, ip: ip.parse::<IpAddr>().unwrap(), prefix, label: label.map(Into::into) }
    }

    #[test]
    fn interfaces_are_as_recorded() {
        let links = [link(1, "lo", Some(&[0; 6])), link(2, "ifb0", Some(&[0x52, 0x54, 0, 0x12, 0x34, 0x56]))];
        let addresses = vec![
            address(1, "127.0.0.1", 8, Some("lo")),
            address(1, "::1", 128, None),
            address(9, "::2", 128, None),
        ];
        let value = interfaces(&links, addresses);
        Type::Array(&INTERFACE).check(&value).unwrap();
        let expected = json!([
            {"name": "lo", "hardware-address": "00:00:00:00:00:00",
                "ip-addresses": [
                    {"ip-address-type": "ipv4", "ip-address": "127.0.0.1", "prefix": 8},
                    {"ip-address-type": "ipv6", "ip-address": "::1", "prefix": 128},
                ],
                "statistics": {"rx-packets": 1, "tx-packets": 2, "rx-bytes": 3, "tx-bytes": 4, "rx-errs": 5,
                    "tx-errs": 6, "rx-dropped": 7, "tx-dropped": u64::MAX}},
            {"name": "ifb0", "hardware-address": "52:54:00:12:34:56"},
        ]);
        assert_eq!(value, expected);
    }

    #[test]
    fn an_alias_is_an_interface_of_its_own() {
        let links = [link(2, "eth0", Some(&[1, 2, 3, 4])), link(3, "tun0", None)];
        let addresses = vec![
            address(2, "10.0.0.1", 8, Some("eth0")),
            address(2, "10.0.0.2", 8, Some("eth0:1")),
            address(3, "fe80::5054:ff:fe12:3456", 64, None),
        ];
        let value = interfaces(&links, addresses);
        Type::Array(&INTERFACE).check(&value).unwrap();
        let names: Vec<&Value> =
            value.as_array().unwrap().iter().map(|interface| &interface["name"]).collect();
        assert_eq!(names, ["eth0", "eth0:1", "tun0"]);
        assert_eq!(value[1]["hardware-address"], "01:02:03:04:00:00");
        assert_eq!(value[1].get("statistics"), None);
        assert_eq!(value[2].get("hardware-address"), None);
        assert_eq!(value[2]["ip-addresses"][0]["ip-address"], "fe80::5054:ff:fe12:3456");
    }
}
