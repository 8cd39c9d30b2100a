//! The rules that kube-proxy writes in nftables mode (1.33 and newer) for services of one port and many endpoints.

use std::fmt::Write as _;

use super::scale::{PORT, Scale, Service};

/// Input of `nft -f -`.
pub(super) fn rules(scale: &Scale, pods: &str) -> String {
    let mut text = BASE.to_owned();
    for (number, service) in scale.services().iter().enumerate() {
        write_service(&mut text, service, &Context { number, pods });
    }
    text
}

struct Context<'a> {
    number: usize,
    /// The prefix of all pods: what comes from elsewhere is masqueraded.
    pods: &'a str,
}

fn write_service(text: &mut String, service: &Service, Context { number, pods }: &Context<'_>) {
    let Service { name, ip, endpoints, .. } = service;
    // kube-proxy puts a hash of eight characters where the number is.
    let id = format!("service-{number:08}-default/{name}/tcp/http");
    let mut choices = Vec::new();
    for (place, endpoint) in endpoints.iter().enumerate() {
        let (addr, port) = (endpoint.ip(), endpoint.port());
        let chain = format!("endpoint-{number:06}{place:02}-default/{name}/tcp/http__{addr}/{port}");
        let _infallible = writeln!(
            text,
            "add chain ip kube-proxy {chain}\n\
             add rule ip kube-proxy {chain} ip saddr {addr} jump mark-for-masquerade\n\
             add rule ip kube-proxy {chain} meta l4proto tcp dnat to {endpoint}"
        );
        choices.push(format!("{place} : goto {chain}"));
    }
    let _infallible = writeln!(
        text,
        "add chain ip kube-proxy {id}\n\
         add rule ip kube-proxy {id} ip daddr {ip} ip saddr != {pods} jump mark-for-masquerade\n\
         add rule ip kube-proxy {id} numgen random mod {} vmap {{ {} }}\n\
         add element ip kube-proxy cluster-ips {{ {ip} }}\n\
         add element ip kube-proxy service-ips {{ {ip} . tcp . {PORT} : goto {id} }}",
        choices.len(),
        choices.join(", ")
    );
}

/// What is there without any service.
const BASE: &str = "\
add table ip kube-proxy
add set ip kube-proxy cluster-ips { type ipv4_addr ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0 ; }
add chain ip kube-proxy filter-input { type filter hook input priority 0 ; }
add chain ip kube-proxy filter-output { type filter hook output priority 0 ; }
add chain ip kube-proxy firewall-check
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy reject-chain
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject
add rule ip kube-proxy cluster-ips-check ip daddr { 10.96.0.0/12 } drop
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy mark-for-masquerade meta mark set meta mark or 0x4000
add rule ip kube-proxy masquerading meta mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading meta mark set meta mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy reject-chain reject
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::scale::tests::scale;

    #[test]
    fn a_service_is_an_element_a_chain_and_a_chain_for_each_endpoint() {
        let text = rules(&scale(20), "10.244.0.0/16");
        let added = |what: &str| text.lines().filter(|line| line.starts_with(what)).count();
        assert_eq!(added("add element ip kube-proxy service-ips"), 20);
        assert_eq!(added("add chain ip kube-proxy service-0"), 20);
        assert_eq!(added("add chain ip kube-proxy endpoint-"), 200);
        assert_eq!(added("add rule ip kube-proxy endpoint-"), 400);
    }

    #[test]
    fn a_chain_chooses_among_chains_that_are_there() {
        let text = rules(&scale(10), "10.244.0.0/16");
        let chain = "endpoint-00000509-default/svc-00005/tcp/http__10.128.0.59/8080";
        assert!(text.contains(&format!("add chain ip kube-proxy {chain}\n")));
        assert!(text.contains(&format!("{chain} meta l4proto tcp dnat to 10.128.0.59:8080\n")));
        assert!(text.contains(&format!("9 : goto {chain} }}\n")));
        assert!(text.contains("numgen random mod 10 vmap { 0 : goto endpoint-00000000-"));
        assert!(text.contains(
            "service-ips { 10.96.0.1 . tcp . 80 : goto service-00000000-default/svc-00000/tcp/http }"
        ));
    }
}
