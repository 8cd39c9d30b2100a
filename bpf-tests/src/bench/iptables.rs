//! The rules that kube-proxy writes in iptables mode (1.3x) for services of one port and many endpoints.

use std::fmt::Write as _;

use super::scale::{PORT, Scale, Service};

/// Input of `iptables-restore`. kube-proxy adds `--noflush`; in a fresh namespace that changes nothing, but it takes
/// iptables 1.8.9 minutes. `pods` is the prefix of all pods: what comes from elsewhere is masqueraded.
pub(super) fn rules(scale: &Scale, pods: &str) -> String {
    let services = || scale.services().iter().enumerate();
    let mut text = format!("{FILTER}{NAT_CHAINS}");
    for (number, service) in services() {
        let _infallible = writeln!(text, ":{} - [0:0]", service_chain(number));
        for place in 0..service.endpoints.len() {
            let _infallible = writeln!(text, ":{} - [0:0]", endpoint_chain(number, place));
        }
    }
    text += NAT_RULES;
    // Tried one after the other, by every packet that opens a connection.
    for (number, Service { name, ip, .. }) in services() {
        let _infallible = writeln!(
            text,
            "-A KUBE-SERVICES -m comment --comment \"default/{name}:http cluster IP\" -m tcp -p tcp -d {ip} \
             --dport {PORT} -j {}",
            service_chain(number)
        );
    }
    text += "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in \
             this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n";
    for (number, service) in services() {
        write_service(&mut text, number, service, pods);
    }
    text + "COMMIT\n"
}

fn write_service(text: &mut String, number: usize, service: &Service, pods: &str) {
    let Service { name, ip, endpoints, .. } = service;
    let chain = service_chain(number);
    let _infallible = writeln!(
        text,
        "-A {chain} -m comment --comment \"default/{name}:http cluster IP\" -m tcp -p tcp -d {ip} --dport {PORT} \
         ! -s {pods} -j KUBE-MARK-MASQ"
    );
    for (place, endpoint) in endpoints.iter().enumerate() {
        let _infallible =
            write!(text, "-A {chain} -m comment --comment \"default/{name}:http -> {endpoint}\"");
        let left = endpoints.len() - place;
        if left > 1 {
            let _infallible =
                write!(text, " -m statistic --mode random --probability {:.10}", 1.0 / left as f64);
        }
        let _infallible = writeln!(text, " -j {}", endpoint_chain(number, place));
    }
    for (place, endpoint) in endpoints.iter().enumerate() {
        let (chain, addr) = (endpoint_chain(number, place), endpoint.ip());
        let _infallible = writeln!(
            text,
            "-A {chain} -m comment --comment default/{name}:http -s {addr} -j KUBE-MARK-MASQ\n\
             -A {chain} -m comment --comment default/{name}:http -m tcp -p tcp -j DNAT --to-destination {endpoint}"
        );
    }
}

/// kube-proxy puts a hash of 16 characters where the number is.
fn service_chain(number: usize) -> String {
    format!("KUBE-SVC-{number:016}")
}

fn endpoint_chain(number: usize, place: usize) -> String {
    format!("KUBE-SEP-{number:014}{place:02}")
}

const FILTER: &str = "\
*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\" -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

const NAT_CHAINS: &str = "\
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
";

const NAT_RULES: &str = "\
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::scale::tests::scale;

    #[test]
    fn the_services_are_one_chain_in_order() {
        let text = rules(&scale(20), "10.244.0.0/16");
        let portals: Vec<_> = text.lines().filter(|line| line.starts_with("-A KUBE-SERVICES ")).collect();
        assert_eq!(portals.len(), 21);
        assert!(portals[0].ends_with("-d 10.96.0.1 --dport 80 -j KUBE-SVC-0000000000000000"));
        assert!(portals[19].ends_with("-d 10.96.0.20 --dport 80 -j KUBE-SVC-0000000000000019"));
        assert!(portals[20].ends_with("--dst-type LOCAL -j KUBE-NODEPORTS"));
    }

    #[test]
    fn every_endpoint_has_the_same_chance() {
        let text = rules(&scale(10), "10.244.0.0/16");
        let mut missed = 1.0;
        for line in text
            .lines()
            .filter(|line| line.starts_with("-A KUBE-SVC-0000000000000004 ") && line.contains("->"))
        {
            let chance = line.split_once("--probability ").map_or(1.0, |(_, rest)| {
                rest.split(' ').next().and_then(|number| number.parse::<f64>().ok()).unwrap()
            });
            assert!((missed * chance - 0.1).abs() < 1e-6, "{line}");
            missed *= 1.0 - chance;
        }
        assert_eq!(missed, 0.0);
    }

    #[test]
    fn every_chain_is_declared_once_and_its_name_fits() {
        let text = rules(&scale(10), "10.244.0.0/16");
        let declared: Vec<_> = text.lines().filter_map(|line| line.strip_prefix(":KUBE-SEP-")).collect();
        assert_eq!(declared.len(), 100);
        assert!(endpoint_chain(99_999, 9).len() < 29);
        assert_eq!(text.matches("COMMIT\n").count(), 2);
    }
}
