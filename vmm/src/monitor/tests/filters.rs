//! Limits and faults of disks.

use super::*;

fn throttle(lab: &mut Lab, client: &mut Client, more: Value) -> Value {
    let mut arguments = json!({"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
    let Value::Object(more) = more else { panic!("not an object") };
    arguments.as_object_mut().unwrap().extend(more);
    lab.ask(client, &json!({"execute": "block_set_io_throttle", "arguments": arguments}))
}

#[test]
fn limits_are_set_told_and_lifted() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    let inserted = |lab: &mut Lab, client: &mut Client| {
        let reply = lab.ask(client, &json!({"execute": "query-block"}));
        conforms(&reply["return"], &commands::find("query-block").unwrap().returns).unwrap();
        reply["return"][0]["inserted"].clone()
    };
    let before = inserted(&mut lab, &mut client);
    assert_eq!((&before["bps"], &before["iops_wr"]), (&json!(0), &json!(0)));
    assert!(before.get("group").is_none() && before.get("bps_max").is_none());

    let more = json!({"device": "disk0", "bps": 1000, "iops_rd": 10, "iops_rd_max": 20, "iops_size": 4096});
    assert_eq!(throttle(&mut lab, &mut client, more), json!({"return": {}}));
    let after = inserted(&mut lab, &mut client);
    for (name, value) in [("bps", 1000), ("bps_rd", 0), ("iops_rd", 10), ("iops_rd_max", 20)] {
        assert_eq!(after[name], value, "{name}");
    }
    assert_eq!((&after["iops_rd_max_length"], &after["iops_size"]), (&json!(1), &json!(4096)));
    assert_eq!(after["group"], "disk0");

    let qdev = json!({"id": "/machine/peripheral/disk0/virtio-backend"});
    assert_eq!(throttle(&mut lab, &mut client, qdev), json!({"return": {}}));
    assert_eq!(inserted(&mut lab, &mut client), before);
}

#[test]
fn limits_that_make_no_sense_are_refused_in_qemus_words() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    let reply = throttle(&mut lab, &mut client, json!({"device": "zz"}));
    assert_eq!(reply["error"], json!({"class": "DeviceNotFound", "desc": "Device 'zz' not found"}));
    for (more, desc) in [
        (json!({}), "Need exactly one of 'device' and 'id'"),
        (json!({"device": "disk0", "id": "disk0"}), "Need exactly one of 'device' and 'id'"),
        (json!({"id": "disk0", "bps": -1}), "bps/iops/max values must be within [0, 1000000000000000]"),
        (json!({"id": "disk0", "bps_max": 5}), "bps_max/iops_max require corresponding bps/iops values"),
        (json!({"id": "disk0", "iops_size": 5}), "iops size requires an iops value to be set"),
        (json!({"id": "disk0", "bps": 5, "bps_max_length": 0}), "the burst length cannot be 0"),
        (
            json!({"id": "disk0", "bps": 5, "bps_rd": 5}),
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        (json!({"id": "disk0", "bps": "5"}), "Invalid parameter type for 'bps', expected: integer"),
        (
            json!({"id": "disk0", "group": "g"}),
            "Parameter 'group' expects 'disk0': disks do not share limits",
        ),
    ] {
        assert_eq!(throttle(&mut lab, &mut client, more)["error"]["desc"], desc);
    }
    let reply =
        lab.ask(&mut client, &json!({"execute": "block_set_io_throttle", "arguments": {"id": "disk0"}}));
    assert_eq!(reply["error"]["desc"], "Parameter 'bps' is missing");
    assert_eq!(lab.vm.filters.limits(), block::ThrottleLimits::default());
}

#[test]
fn faults_are_added_listed_and_removed() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    let ask = |lab: &mut Lab, client: &mut Client, execute: &str, arguments: Value| {
        let reply = lab.ask(client, &json!({"execute": execute, "arguments": arguments}));
        if let Some(value) = reply.get("return") {
            conforms(value, &commands::find(execute).unwrap().returns).unwrap();
        }
        reply
    };
    let fault =
        json!({"device": "disk0", "op": "write", "sector": 8, "sectors": 4, "errno": "EIO", "count": 2});
    assert_eq!(ask(&mut lab, &mut client, "tarn-fault-add", fault)["return"], json!({"id": 1}));
    let slow = json!({"device": "disk0", "op": "any", "delay-ms": 20});
    assert_eq!(ask(&mut lab, &mut client, "tarn-fault-add", slow)["return"], json!({"id": 2}));
    let listed = ask(&mut lab, &mut client, "tarn-query-faults", json!({}))["return"].clone();
    let expected = json!([
        {"device": "disk0", "node-name": "#block001", "id": 1, "op": "write", "sector": 8, "sectors": 4, "errno": "EIO", "count": 2,
            "matched": 0, "hits": 0},
        {"device": "disk0", "node-name": "#block001", "id": 2, "op": "any", "delay-ms": 20, "matched": 0, "hits": 0},
    ]);
    assert_eq!(listed, expected);
    let blocks = ask(&mut lab, &mut client, "query-block", json!({}))["return"].clone();
    assert_eq!(blocks[0]["tarn-faults"], expected);

    for (execute, arguments, desc) in [
        ("tarn-fault-add", json!({"device": "zz", "op": "read"}), "Device 'zz' not found"),
        ("tarn-fault-add", json!({"op": "read"}), "Need exactly one of 'device' and 'node-name'"),
        (
            "tarn-query-faults",
            json!({"device": "disk0", "node-name": "a"}),
            "Need exactly one of 'device' and 'node-name'",
        ),
        ("tarn-fault-remove", json!({"node-name": "zz"}), "Cannot find device='' nor node-name='zz'"),
        (
            "tarn-fault-add",
            json!({"device": "disk0", "op": "volatile-cache", "count": 1}),
            "A volatile cache takes a seed and nothing else",
        ),
        (
            "tarn-fault-add",
            json!({"device": "disk0", "op": "read"}),
            "A fault needs an errno, a delay or a torn write",
        ),
        (
            "tarn-fault-add",
            json!({"device": "disk0", "op": "seek"}),
            "Parameter 'op' does not accept value 'seek'",
        ),
        (
            "tarn-fault-add",
            json!({"device": "disk0", "op": "read", "errno": "X"}),
            "\"X\" is no errno, as in EIO",
        ),
        (
            "tarn-fault-add",
            json!({"device": "disk0", "op": "read", "errno": "EIO", "after": -1}),
            "Parameter 'after' expects a non-negative value",
        ),
        ("tarn-fault-remove", json!({"device": "disk0", "id": 7}), "Device 'disk0' has no fault 7"),
        ("tarn-query-faults", json!({"device": "zz"}), "Device 'zz' not found"),
    ] {
        assert_eq!(ask(&mut lab, &mut client, execute, arguments)["error"]["desc"], desc);
    }

    let one = json!({"device": "disk0", "id": 1});
    assert_eq!(ask(&mut lab, &mut client, "tarn-fault-remove", one)["return"], json!({}));
    let left = ask(&mut lab, &mut client, "tarn-query-faults", json!({"node-name": "#block001"}));
    assert_eq!(left["return"].as_array().unwrap().len(), 1);
    let all = json!({"device": "disk0"});
    assert_eq!(ask(&mut lab, &mut client, "tarn-fault-remove", all)["return"], json!({}));
    let blocks = ask(&mut lab, &mut client, "query-block", json!({}))["return"].clone();
    assert!(blocks[0].get("tarn-faults").is_none());
}

#[test]
fn a_node_has_limits_and_faults_of_its_own() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("t.raw");
    std::fs::write(&image, [0; 4096]).unwrap();
    let mut ask = |execute: &str, arguments: Value| {
        let reply = lab.ask(&mut client, &json!({"execute": execute, "arguments": arguments}));
        if let Some(value) = reply.get("return") {
            conforms(value, &commands::find(execute).unwrap().returns).unwrap();
        }
        reply["return"].clone()
    };
    ask("blockdev-add", json!({"driver": "file", "node-name": "t", "filename": image}));
    let cache = json!({"node-name": "t", "op": "volatile-cache", "seed": 4});
    assert_eq!(ask("tarn-fault-add", cache), json!({"id": 1}));
    let listed = json!([{"node-name": "t", "id": 1, "op": "volatile-cache", "seed": 4, "matched": 0, "hits": 0,
        "unflushed": 0}]);
    assert_eq!(ask("tarn-query-faults", json!({})), listed);
    assert_eq!(ask("tarn-query-faults", json!({"device": "disk0"})), json!([]));
    let limits =
        json!({"node-name": "t", "bps": 1, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
    assert_eq!(ask("block_set_io_throttle", limits), json!({}));
    let nodes = ask("query-named-block-nodes", json!({}));
    let seen: Vec<_> =
        nodes.as_array().unwrap().iter().map(|node| (&node["node-name"], &node["bps"])).collect();
    assert_eq!(seen[0], (&json!("t"), &json!(1)));
    assert!(seen[1..].iter().all(|(_, bps)| **bps == 0));
    assert_eq!(ask("tarn-fault-remove", json!({"node-name": "t"})), json!({}));
    assert_eq!(ask("tarn-query-faults", json!({})), json!([]));
}
