//! The settings of the network namespace, as /proc and /sys have them.

use std::collections::BTreeMap;
use std::fs;

use super::Finding;
use crate::node::links::{self, Role, Seen};

/// IPv6 does not work below (RFC 8200, section 5).
const SMALLEST_MTU: u32 = 1280;

pub(super) fn findings() -> Vec<Finding> {
    let seen = match links::all() {
        Ok(seen) => seen,
        Err(error) => return vec![Finding::fail("devices", error.to_string(), "run as root")],
    };
    let devices = devices(&seen);
    vec![forwarding(), reverse_paths(&devices), mtu(&devices)]
}

/// The host's own, with their MTU in bytes. Where none is, a pair may lead out (a node that is a container).
fn devices(seen: &[Seen]) -> BTreeMap<String, u32> {
    let of = |role: Role| -> BTreeMap<_, _> {
        let found = seen.iter().filter(|it| it.role == role);
        found.map(|it| (it.link.name.clone(), it.mtu)).collect()
    };
    let devices = of(Role::Device);
    if devices.is_empty() { of(Role::Pair) } else { devices }
}

fn forwarding() -> Finding {
    let switches = [("IPv4", "net/ipv4/ip_forward"), ("IPv6", "net/ipv6/conf/all/forwarding")];
    let off: Vec<_> = switches.into_iter().filter(|(_, path)| sysctl(path).as_deref() == Some("0")).collect();
    if off.is_empty() {
        return Finding::ok("forwarding", "on");
    }
    let families: Vec<_> = off.iter().map(|(family, _)| *family).collect();
    let commands: Vec<_> =
        off.iter().map(|(_, path)| format!("sysctl -w {}=1", path.replace('/', "."))).collect();
    Finding::warn(
        "forwarding",
        format!("off for {}", families.join(" and ")),
        format!(
            "an agent with --cni turns on what its node's pods use; beside another plugin: {}",
            commands.join("; ")
        ),
    )
}

/// Strict filtering drops what comes in by another way than its answer would go out: pods' packets that are redirected,
/// and NodePorts on hosts with several devices. The kernel takes the larger of `all` and the device's own.
fn reverse_paths(devices: &BTreeMap<String, u32>) -> Finding {
    let value =
        |name: &str| sysctl(&format!("net/ipv4/conf/{name}/rp_filter")).and_then(|it| it.parse().ok());
    let all: u8 = value("all").unwrap_or(0);
    let strict: Vec<_> =
        devices.keys().filter(|name| value(name).unwrap_or(0).max(all) == 1).map(String::as_str).collect();
    if strict.is_empty() {
        return Finding::ok("rp_filter", "not strict on any device");
    }
    Finding::warn(
        "rp_filter",
        format!("strict on {}", strict.join(", ")),
        "replies that leave by another device are dropped: sysctl -w net.ipv4.conf.all.rp_filter=2 (2 is loose, and \
         outweighs 1), and the same in /etc/sysctl.d",
    )
}

fn mtu(devices: &BTreeMap<String, u32>) -> Finding {
    let list = || devices.iter().map(|(name, mtu)| format!("{name} {mtu}")).collect::<Vec<_>>().join(", ");
    let (Some(least), Some(most)) = (devices.values().min(), devices.values().max()) else {
        return Finding::warn("mtu", "no device is up", "bring up the device that leads to the other nodes");
    };
    if *least < SMALLEST_MTU {
        return Finding::fail(
            "mtu",
            list(),
            format!("IPv6 needs {SMALLEST_MTU}: ip link set dev DEVICE mtu {SMALLEST_MTU}, or more"),
        );
    }
    if least != most {
        return Finding::warn(
            "mtu",
            list(),
            "the devices differ, and pods get the smallest: give all of them, on all nodes, the same",
        );
    }
    Finding::ok("mtu", list())
}

fn sysctl(path: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/sys/{path}")).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::Grade;
    use super::*;

    #[test]
    fn devices_of_different_sizes_are_told_and_too_small_ones_fail() {
        let devices =
            |sizes: &[(&str, u32)]| sizes.iter().map(|&(name, mtu)| (name.to_owned(), mtu)).collect();
        assert_eq!(mtu(&devices(&[("eth0", 1500), ("eth1", 1500)])).grade, Grade::Ok);
        assert_eq!(mtu(&devices(&[("eth0", 1500), ("eth1", 9000)])).grade, Grade::Warn);
        assert_eq!(mtu(&devices(&[("eth0", 1500), ("tun0", 1279)])).grade, Grade::Fail);
        assert_eq!(mtu(&devices(&[])).grade, Grade::Warn);
    }
}
