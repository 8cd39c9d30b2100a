//! What a runtime asks for beside the specification, by the capabilities that the configuration declares (CONVENTIONS.md
//! of the specification): `runtimeConfig`.

use std::net::IpAddr;

use crate::cni::types::{CniError, Code, PortMapping, RuntimeConfig};
use crate::ipam::host_port::{HostPort, Transport};
use crate::net::queue::{Limit, Limits};

/// `runtimeConfig.portMappings`. What is there twice counts once: containers of one pod may name the same. A hostPort of 0
/// is none.
///
/// # Errors
/// [`Code::INVALID_CONFIG`] with the name of the field.
pub(super) fn host_ports(runtime: &RuntimeConfig) -> Result<Vec<HostPort>, CniError> {
    let mut ports: Vec<HostPort> = Vec::new();
    for (index, mapping) in runtime.port_mappings.iter().flatten().enumerate() {
        if mapping.host_port == 0 {
            continue;
        }
        let port = host_port(index, mapping)?;
        if ports.contains(&port) {
            continue;
        }
        if let Some(other) = ports.iter().find(|other| other.collides(&port)) {
            let why = format!("{port} leads to container port {} already", other.container_port);
            return Err(invalid(index, "hostPort", &why, "a port of the host leads to one port of a pod"));
        }
        ports.push(port);
    }
    Ok(ports)
}

/// `runtimeConfig.bandwidth`, in bits. A rate of 0 is no limit.
///
/// # Errors
/// [`Code::INVALID_CONFIG`] with the name of the field.
pub(super) fn limits(runtime: &RuntimeConfig) -> Result<Limits, CniError> {
    let Some(asked) = &runtime.bandwidth else { return Ok(Limits::default()) };
    let limit = |direction: &str, rate: u64, burst: u64| match rate {
        0 => Ok(None),
        1..8 => {
            let msg = format!("runtimeConfig.bandwidth.{direction}Rate: {rate} bits a second are no byte");
            Err(CniError::new(Code::INVALID_CONFIG, msg).details("8 or more; 0 for no limit"))
        }
        _ => Ok(Some(Limit { rate: rate / 8, burst: burst / 8 })),
    };
    Ok(Limits {
        ingress: limit("ingress", asked.ingress_rate, asked.ingress_burst)?,
        egress: limit("egress", asked.egress_rate, asked.egress_burst)?,
    })
}

fn host_port(index: usize, mapping: &PortMapping) -> Result<HostPort, CniError> {
    let number = |field: &str, value: i64| {
        let port = u16::try_from(value).ok().filter(|port| *port != 0);
        port.ok_or_else(|| invalid(index, field, &format!("{value} is no port"), "1 to 65535"))
    };
    let name = mapping.protocol.as_deref().unwrap_or("tcp");
    let protocol = Transport::ALL.into_iter().find(|known| known.as_str().eq_ignore_ascii_case(name));
    Ok(HostPort {
        host_ip: host_ip(index, mapping.host_ip.as_deref().unwrap_or_default())?,
        host_port: number("hostPort", mapping.host_port)?,
        protocol: protocol
            .ok_or_else(|| invalid(index, "protocol", &format!("{name:?} is none"), "tcp, udp or sctp"))?,
        container_port: number("containerPort", mapping.container_port)?,
    })
}

fn host_ip(index: usize, text: &str) -> Result<Option<IpAddr>, CniError> {
    if text.is_empty() {
        return Ok(None);
    }
    let addr: Result<IpAddr, _> = text.parse();
    let addr = addr.map_err(|_error| {
        invalid(index, "hostIP", &format!("{text:?} is no address"), "empty, or one IPv4 or IPv6 address")
    })?;
    Ok(Some(addr.to_canonical()))
}

fn invalid(index: usize, field: &str, why: &str, expected: &str) -> CniError {
    CniError::new(Code::INVALID_CONFIG, format!("runtimeConfig.portMappings[{index}].{field}: {why}"))
        .details(expected)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(mappings: Value) -> Result<Vec<String>, CniError> {
        let runtime: RuntimeConfig = serde_json::from_value(json!({ "portMappings": mappings })).unwrap();
        let said = |port: HostPort| format!("{port} to {}", port.container_port);
        host_ports(&runtime).map(|ports| ports.into_iter().map(said).collect())
    }

    #[test]
    fn rule_61_mappings_are_read_as_runtimes_write_them() {
        let read = read(json!([
            { "hostPort": 8080, "containerPort": 80, "protocol": "TCP" },
            { "hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "" },
            { "hostPort": 8080, "containerPort": 53, "protocol": "udp" },
            { "hostPort": 8080, "containerPort": 81, "protocol": "tcp", "hostIP": "127.0.0.1" },
            { "hostPort": 8080, "containerPort": 80, "hostIP": "::ffff:10.0.0.1" },
            { "hostPort": 0, "containerPort": 80, "protocol": "tcp" },
            { "hostPort": 38412, "containerPort": 38412, "protocol": "sctp", "hostIP": "fd00::1" },
        ]));
        let expected = [
            "hostPort 8080/tcp to 80",
            "hostPort 8080/udp to 53",
            "hostPort 8080/tcp of 127.0.0.1 to 81",
            "hostPort 8080/tcp of 10.0.0.1 to 80",
            "hostPort 38412/sctp of fd00::1 to 38412",
        ];
        assert_eq!(read.unwrap(), expected);
        assert_eq!(host_ports(&RuntimeConfig::default()), Ok(Vec::new()));
    }

    #[test]
    fn rule_60_a_bad_mapping_has_code_7_and_its_field() {
        for (mapping, field) in [
            (json!({ "hostPort": 70000, "containerPort": 80 }), "hostPort"),
            (json!({ "hostPort": -1, "containerPort": 80 }), "hostPort"),
            (json!({ "hostPort": 80, "containerPort": 0 }), "containerPort"),
            (json!({ "hostPort": 80, "containerPort": 65536 }), "containerPort"),
            (json!({ "hostPort": 80, "containerPort": 80, "protocol": "icmp" }), "protocol"),
            (json!({ "hostPort": 80, "containerPort": 80, "hostIP": "localhost" }), "hostIP"),
            (json!({ "hostPort": 80, "containerPort": 80, "hostIP": "10.0.0.0/8" }), "hostIP"),
            (json!({ "hostPort": 8080, "containerPort": 81, "hostIP": "0.0.0.0" }), "hostPort"),
        ] {
            let first = json!({ "hostPort": 8080, "containerPort": 80 });
            let error = read(json!([first, mapping])).unwrap_err();
            assert_eq!(error.code, Code::INVALID_CONFIG);
            let field = format!("runtimeConfig.portMappings[1].{field}:");
            assert!(error.msg.starts_with(&field), "{field} {error}");
        }
    }

    #[test]
    fn rule_61_limits_are_bits_and_zero_is_none() {
        let read =
            |bandwidth: Value| limits(&serde_json::from_value(json!({ "bandwidth": bandwidth })).unwrap());
        let both = json!({ "ingressRate": 8_000, "ingressBurst": 4_294_967_295u32, "egressRate": 80 });
        let ingress = Some(Limit { rate: 1_000, burst: 536_870_911 });
        assert_eq!(read(both), Ok(Limits { ingress, egress: Some(Limit { rate: 10, burst: 0 }) }));
        assert_eq!(read(json!({ "ingressBurst": 8 })), Ok(Limits::default()));
        assert_eq!(read(Value::Null), Ok(Limits::default()));
        let error = read(json!({ "egressRate": 7 })).unwrap_err();
        assert!(error.msg.starts_with("runtimeConfig.bandwidth.egressRate:"), "{error}");
    }
}
