use std::io;

use super::*;
use crate::ipam::Owner;

const CONFIG: &str = r#"{"cniVersion":"1.1.0","name":"net","type":"ferroflow-cni","socket":"/x.sock"}"#;

fn attached() -> Attached {
    Attached {
        host_interface: "ff0".into(),
        host_mac: "02:00:00:00:00:01".into(),
        mac: "02:00:00:00:00:02".into(),
        mtu: 1450,
        addresses: vec!["10.244.1.2".parse().unwrap(), "fd00::2".parse().unwrap()],
    }
}

/// An agent that does everything it is asked.
fn works(socket: &Path, request: &Request) -> Result<Reply, socket::Unreachable> {
    assert_eq!(socket, Path::new("/x.sock"));
    Ok(match request {
        Request::Add(_) => Reply::Attached(attached()),
        Request::Del(_) | Request::Check { .. } | Request::Gc { .. } | Request::Status { .. } => Reply::Done,
    })
}

/// No agent is there.
fn is_down(_socket: &Path, request: &Request) -> Result<Reply, socket::Unreachable> {
    socket::ask(Path::new("/nonexistent/cni.sock"), request)
}

fn refuses(_socket: &Path, _request: &Request) -> Result<Reply, socket::Unreachable> {
    Ok(Reply::Failed(CniError::new(Code::EXHAUSTED, "none left")))
}

fn must_not_be_asked(_socket: &Path, request: &Request) -> Result<Reply, socket::Unreachable> {
    panic!("asked: {request:?}")
}

fn ask(command: &str, input: &str, agent: Ask) -> (Version, Outcome) {
    let env = |name: &str| {
        let value = match name {
            "CNI_COMMAND" => command,
            "CNI_CONTAINERID" => "c1",
            "CNI_NETNS" => "/run/netns/c1",
            "CNI_IFNAME" => "eth0",
            _ => return None,
        };
        Some(OsString::from(value))
    };
    run(&env, &mut input.as_bytes(), agent)
}

fn error(command: &str, input: &str) -> CniError {
    ask(command, input, must_not_be_asked).1.unwrap_err()
}

/// The configuration with a field set, or without it.
fn config(field: &str, value: Option<Value>) -> String {
    let mut config: Value = serde_json::from_str(CONFIG).unwrap();
    match value {
        Some(value) => config[field] = value,
        None => drop(config.as_object_mut().unwrap().remove(field)),
    }
    config.to_string()
}

#[test]
fn rule_55_add_reports_both_ends_addresses_and_routes() {
    let (_, outcome) = ask("ADD", CONFIG, works);
    assert_eq!(
        outcome.unwrap().unwrap(),
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                { "name": "ff0", "mac": "02:00:00:00:00:01", "mtu": 1450 },
                { "name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/c1", "mtu": 1450 },
            ],
            "ips": [
                { "address": "10.244.1.2/32", "gateway": "169.254.1.1", "interface": 1 },
                { "address": "fd00::2/128", "gateway": "fe80::1", "interface": 1 },
            ],
            "routes": [
                { "dst": "0.0.0.0/0", "gw": "169.254.1.1" },
                { "dst": "::/0", "gw": "fe80::1" },
            ],
            "dns": {},
        })
    );
    for version in Version::ALL {
        let input = config("cniVersion", Some(version.as_str().into()));
        let output = ask("ADD", &input, works).1.unwrap().unwrap();
        assert_eq!(output["cniVersion"], version.as_str());
        assert_eq!(output["ips"][1].get("version").is_some(), version < Version::V1_0_0);
    }
}

#[test]
fn rule_55_what_plugins_before_reported_comes_first() {
    let before = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{ "name": "tap0", "sandbox": "/run/netns/c1" }],
        "ips": [{ "address": "192.168.0.2/24", "interface": 0 }],
        "dns": { "nameservers": ["10.96.0.10"] },
    });
    let output = ask("ADD", &config("prevResult", Some(before)), works).1.unwrap().unwrap();
    let names: Vec<_> = (0..3).map(|at| output["interfaces"][at]["name"].clone()).collect();
    assert_eq!(names, ["tap0", "ff0", "eth0"]);
    assert_eq!((&output["ips"][0]["interface"], &output["ips"][1]["interface"]), (&json!(0), &json!(2)));
    assert_eq!(output["dns"]["nameservers"][0], "10.96.0.10");
    let bad = config("prevResult", Some(json!({ "ips": "none" })));
    assert_eq!(error("ADD", &bad).code, Code::DECODING);
}

#[test]
fn rule_60_versions_are_told_and_others_are_refused() {
    let told = |input: &str| ask("VERSION", input, must_not_be_asked).1;
    let supported = json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    for (input, version) in [(r#"{"cniVersion":"0.4.0"}"#, "0.4.0"), ("", "1.1.0"), ("{}", "1.1.0")] {
        let output = told(input).unwrap().unwrap();
        assert_eq!(output, json!({ "cniVersion": version, "supportedVersions": supported }));
    }
    assert_eq!(told("[").unwrap_err().code, Code::DECODING);
    for (command, version) in [
        ("ADD", Some("0.3.0")),
        ("ADD", Some("2.0.0")),
        ("ADD", None),
        ("CHECK", Some("0.3.1")),
        ("STATUS", Some("1.0.0")),
        ("GC", Some("1.0.0")),
    ] {
        let input = config("cniVersion", version.map(Into::into));
        let error = error(command, &input);
        assert_eq!(error.code, Code::INCOMPATIBLE_VERSION, "{command} {version:?}");
        assert!(error.msg.contains(version.unwrap_or("0.1.0")), "{error}");
    }
}

#[test]
fn rule_60_each_fault_of_a_configuration_has_its_code() {
    for (input, code, word) in [
        (String::new(), Code::DECODING, "network configuration"),
        ("{".into(), Code::DECODING, "network configuration"),
        ("[]".into(), Code::DECODING, "network configuration"),
        (format!("{CONFIG} x"), Code::DECODING, "network configuration"),
        (config("mtu", Some(json!("big"))), Code::DECODING, "mtu"),
        (config("name", None), Code::INVALID_CONFIG, "name"),
        (config("name", Some(json!("a/b"))), Code::INVALID_CONFIG, "a/b"),
        (config("mtu", Some(json!(67))), Code::INVALID_CONFIG, "67"),
        (config("ipam", Some(json!({ "type": "dhcp" }))), Code::INVALID_ENVIRONMENT, "dhcp"),
        (config("ipam", Some(json!({ "type": "../dhcp" }))), Code::INVALID_CONFIG, "../dhcp"),
        (
            config(
                "runtimeConfig",
                Some(
                    json!({ "portMappings": [{ "hostPort": 80, "containerPort": 80, "protocol": "icmp" }] }),
                ),
            ),
            Code::INVALID_CONFIG,
            "runtimeConfig.portMappings[0].protocol",
        ),
        (
            config("runtimeConfig", Some(json!({ "bandwidth": { "ingressRate": 7 } }))),
            Code::INVALID_CONFIG,
            "runtimeConfig.bandwidth.ingressRate",
        ),
    ] {
        let error = error("ADD", &input);
        assert_eq!(error.code, code, "{input}: {error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }
    let env = |name: &str| (name == "CNI_COMMAND").then(|| OsString::from("STATUS"));
    assert_eq!(run(&env, &mut Broken, must_not_be_asked).1.unwrap_err().code, Code::IO);
}

#[test]
fn rule_61_what_a_runtime_adds_and_nobody_asked_for_is_ignored() {
    for runtime in [
        json!({}),
        json!({ "portMappings": [], "bandwidth": {} }),
        json!({ "portMappings": [{ "hostPort": 0, "containerPort": 80, "protocol": "TCP" }], "dns": {} }),
        json!({ "ips": ["10.0.0.1/24"], "mac": "02:00:00:00:00:09", "cgroupPath": "/a" }),
    ] {
        assert!(ask("ADD", &config("runtimeConfig", Some(runtime)), works).1.is_ok());
    }
    for ipam in [json!({}), json!({ "type": "ferroflow" }), Value::Null] {
        assert!(ask("ADD", &config("ipam", Some(ipam)), works).1.is_ok());
    }
}

#[test]
fn rule_61_mappings_of_ports_are_told_to_the_agent() {
    fn sees(socket: &Path, request: &Request) -> Result<Reply, socket::Unreachable> {
        let Request::Add(attachment) = request else { panic!("{request:?}") };
        let said: Vec<_> = attachment.host_ports.iter().map(ToString::to_string).collect();
        assert_eq!(said, ["hostPort 8080/tcp", "hostPort 8080/udp of 127.0.0.1"]);
        works(socket, request)
    }
    let mappings = json!({ "portMappings": [
        { "hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "" },
        { "hostPort": 8080, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1" },
    ] });
    assert!(ask("ADD", &config("runtimeConfig", Some(mappings)), sees).1.is_ok());
}

#[test]
fn rule_60_without_an_agent_the_runtime_is_to_come_again() {
    for (command, code) in [("ADD", Code::TRY_AGAIN_LATER), ("STATUS", Code::NOT_AVAILABLE)] {
        let error = ask(command, CONFIG, is_down).1.unwrap_err();
        assert_eq!(error.code, code, "{command}");
        assert!(error.msg.contains("/nonexistent/cni.sock"), "{error}");
    }
    assert_eq!(ask("ADD", CONFIG, refuses).1.unwrap_err().code, Code::EXHAUSTED);
}

#[test]
fn rule_56_del_succeeds_and_is_left_in_the_spool() {
    let dir = tempfile::tempdir().unwrap();
    let input = config("stateDir", Some(dir.path().to_str().unwrap().into()));
    let owner = Owner { container_id: "c1".into(), ifname: "eth0".into() };
    for agent in [is_down as Ask, refuses] {
        assert_eq!(ask("DEL", &input, agent).1, Ok(None));
        assert_eq!(spool::list(dir.path()).unwrap(), [Removal { owner: owner.clone() }]);
        spool::done(dir.path(), &Removal { owner: owner.clone() }).unwrap();
    }
    assert_eq!(ask("DEL", &input, works).1, Ok(None));
    assert_eq!(spool::list(dir.path()).unwrap(), []);
    let nowhere = config("stateDir", Some("/proc/no/such".into()));
    assert_eq!(ask("DEL", &nowhere, is_down).1, Ok(None), "the sweep finds it");
    for (field, value) in [("cniVersion", Some(json!("0.2.0"))), ("cniVersion", None), ("name", None)] {
        assert_eq!(ask("DEL", &config(field, value), works).1, Ok(None));
    }
    let old = json!({ "cniVersion": "0.2.0", "ip4": { "ip": "10.0.0.2/24" } });
    assert_eq!(ask("DEL", &config("prevResult", Some(old)), works).1, Ok(None));
}

#[test]
fn rule_57_check_compares_with_what_add_reported() {
    fn sees(_socket: &Path, request: &Request) -> Result<Reply, socket::Unreachable> {
        let Request::Check { addresses, .. } = request else { panic!("{request:?}") };
        assert_eq!(addresses.len(), 2);
        Ok(Reply::Done)
    }
    let mut result = ask("ADD", CONFIG, works).1.unwrap().unwrap();
    // A plugin after this one.
    result["interfaces"].as_array_mut().unwrap().push(json!({ "name": "ifb0" }));
    assert_eq!(ask("CHECK", &config("prevResult", Some(result.clone())), sees).1, Ok(None));
    assert_eq!(error("CHECK", CONFIG).code, Code::INVALID_CONFIG);
    result["interfaces"][1]["name"] = "eth1".into();
    assert_eq!(error("CHECK", &config("prevResult", Some(result))).code, Code::INVALID_CONFIG);
}

#[test]
fn rule_59_gc_without_a_list_collects_nothing() {
    fn sees(_socket: &Path, request: &Request) -> Result<Reply, socket::Unreachable> {
        let owner = Owner { container_id: "c1".into(), ifname: "eth0".into() };
        assert_eq!(*request, Request::Gc { network: "net".into(), valid: vec![owner] });
        Ok(Reply::Done)
    }
    assert_eq!(error("GC", CONFIG).code, Code::INVALID_CONFIG);
    let valid = json!([{ "containerID": "c1", "ifname": "eth0" }]);
    assert_eq!(ask("GC", &config("cni.dev/valid-attachments", Some(valid)), sees).1, Ok(None));
}

/// Whatever comes in, what goes out is a result or an error as the specification has them.
#[test]
fn rule_60_random_input_is_answered_with_json() {
    let seeds = [
        CONFIG.to_owned(),
        config("prevResult", ask("ADD", CONFIG, works).1.unwrap()),
        config("runtimeConfig", Some(json!({ "portMappings": [{ "hostPort": 1, "containerPort": 2 }] }))),
        config("cni.dev/valid-attachments", Some(json!([{ "containerID": "c1", "ifname": "eth0" }]))),
    ];
    let mut state = 7u64;
    let mut random = |below: usize| {
        state = ferroflow_common::hash::mix(state, 0x9e37);
        (state >> 33) as usize % below
    };
    let (mut good, mut bad) = (0, 0);
    for round in 0..20_000 {
        let mut text = seeds[random(seeds.len())].clone().into_bytes();
        for _ in 0..random(4) {
            let at = random(text.len());
            match random(5) {
                0 if text.len() > 1 => drop(text.remove(at)),
                0 => {}
                1 => text[at] = random(256) as u8,
                2 => text.truncate(at.max(1)),
                3 => text.insert(at, b"{}[],:\"0-n"[random(10)]),
                _ => {
                    let piece = text[at..text.len().min(at + 1 + random(12))].to_vec();
                    let to = random(text.len());
                    text.splice(to..to, piece);
                }
            }
        }
        let command = ["ADD", "CHECK", "GC", "STATUS", "VERSION"][round % 5];
        let env = |name: &str| match name {
            "CNI_COMMAND" => Some(OsString::from(command)),
            "CNI_CONTAINERID" => Some("c1".into()),
            "CNI_NETNS" => Some("/run/netns/c1".into()),
            "CNI_IFNAME" => Some("eth0".into()),
            _ => None,
        };
        let any: Ask = |_socket, request| {
            Ok(if matches!(request, Request::Add(_)) { Reply::Attached(attached()) } else { Reply::Done })
        };
        match run(&env, &mut &text[..], any) {
            (_, Ok(output)) => {
                good += 1;
                assert_eq!(output.is_some(), ["ADD", "VERSION"].contains(&command));
            }
            (version, Err(error)) => {
                bad += 1;
                let written: Value = serde_json::from_str(&error_json(version, &error).to_string()).unwrap();
                let code = written["code"].as_u64().unwrap();
                assert!([1, 2, 6, 7].contains(&code), "{written}");
                assert!(written["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{written}");
                assert!(written["cniVersion"].is_string());
            }
        }
    }
    assert!(good > 1000 && bad > 1000, "{good} good, {bad} bad");
}
